"""`write` with what holds other answers: it certifies, changes less, is resumed, and obeys."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import memlaw
from memlaw.core.errors import ConfigError
from memlaw.data.bad_rows import BadRows
from memlaw.data.texts import general_texts
from memlaw.measure.harm import KINDS
from memlaw.measure.subject import Subject
from memlaw.model.adapter import attached
from memlaw.model.base import load_model
from memlaw.model.formats import loaded_adapter
from memlaw.settings.recipe import RECIPE
from memlaw.train import gate
from memlaw.train.holding import Holding
from memlaw.writer import goals, mean_goals
from memlaw.writer.state import Run
from memlaw.writer.update_goals import UpdateMeanGoals

# What tiny random models can learn: they are of no use elsewhere, and so hold nothing.
EASY = {"retention": 3.0, "max_epochs": 300, "dtype": "float32"}


class Stop(memlaw.Observer):
    """Ends the run after an epoch, as Ctrl-C does; keeps what was said."""

    def __init__(self, after=None):
        self.after, self.said, self.curve = after, [], []

    def notice(self, text):
        self.said.append(text)

    def epoch(self, stats, n_records, max_epochs):
        self.curve.append(stats)
        if stats.epoch == self.after:
            raise KeyboardInterrupt


def _adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_certifies_and_changes_less_elsewhere(make_model, phone_book, texts, tmp_path, name):
    """Seed 0, models with and without a chat template."""
    harms = {}
    for specificity in (True, False):
        out = tmp_path / str(specificity)
        settings = EASY | texts | {"rank": 32, "seed": 0, "specificity": specificity}
        result = memlaw.write(phone_book, out, model=str(make_model(name)), **settings)
        assert result.certified
        assert memlaw.audit(phone_book, adapter=out, model=str(make_model(name))).n_certified == 4
        base = load_model(make_model(name), dtype="float32")
        subject = Subject(
            base=base,
            texts=general_texts(**texts),
            records=memlaw.read_records(phone_book),
            format=result.certificate.prompt_format,
        )
        harms[specificity] = {}
        for kind in ("elsewhere", "near_misses"):
            measurement = KINDS[kind].of_run(subject)
            harms[specificity][kind] = measurement.measure(
                base.model, lambda out=out, base=base: loaded_adapter(out, base.model)
            )
    held, free = harms[True], harms[False]
    assert held["elsewhere"].kl_nats < 0.75 * free["elsewhere"].kl_nats
    assert held["near_misses"].made_up < 0.5 * free["near_misses"].made_up


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 20])
def test_a_resumed_run_ends_in_the_same_bytes(
    llama, phone_book, texts, tmp_path, after, monkeypatch
):
    monkeypatch.setattr("memlaw.writer.run._CHECKPOINT_EVERY_S", 0.0)
    settings = EASY | texts | {"rank": 8, "layers": (1, 2), "max_epochs": 30, "model": str(llama)}
    whole = memlaw.write(phone_book, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        memlaw.write(phone_book, tmp_path / "out", observer=Stop(after), **settings)
    resumed = memlaw.write(phone_book, tmp_path / "out", resume=True, **settings)
    assert resumed.epochs == whole.epochs == 30
    assert _adapter(tmp_path / "out") == _adapter(tmp_path / "whole")


@pytest.mark.slow
def test_more_epochs_after_giving_up_equal_one_longer_run(llama, phone_book, texts, tmp_path):
    settings = EASY | texts | {"rank": 8, "model": str(llama)}
    first = memlaw.write(phone_book, tmp_path / "out", **settings | {"max_epochs": 20})
    assert not first.certified
    memlaw.write(phone_book, tmp_path / "out", resume=True, **settings | {"max_epochs": 26})
    memlaw.write(phone_book, tmp_path / "whole", **settings | {"max_epochs": 26})
    assert _adapter(tmp_path / "out") == _adapter(tmp_path / "whole")


def _run(model, records, tmp_path, texts, **settings):
    config = memlaw.WriteConfig(**EASY | texts | settings).resolved()
    return Run(
        records=memlaw.read_records(records),
        bad=BadRows(),
        texts=general_texts(**texts),
        base=load_model(model, dtype="float32"),
        config=config,
        out=tmp_path,
        observer=memlaw.Observer(),
    )


def test_by_default_the_rank_is_shared_among_the_layers(llama, phone_book, texts, tmp_path):
    run = _run(llama, phone_book, tmp_path, texts)
    assert run.learner.holding is not None
    assert run.config.objective == RECIPE.objective
    assert run.config.learning_rate == RECIPE.learning_rate
    free = _run(llama, phone_book, tmp_path, texts, specificity=False)
    assert free.learner.holding is None
    assert (free.config.objective, free.config.learning_rate) == ("triage", 1e-2)
    layers = {site.layer for site in run.sites}
    assert run.learner.adapter.rank == free.learner.adapter.rank // len(layers)
    assert len(free.sites) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"rank": 5},
        {"layers": (0,)},
        {"placement": "attn"},
        {"placement": "all-linear", "layers": (0, 2)},
        {"objective": "triage"},
        {"learning_rate": 3e-3},
        {"batch_size": 2},
        {"engine": "plain"},
        {"whiten": False},
        {"retention": 0.0},
    ],
)
def test_what_is_asked_for_is_obeyed(llama, phone_book, texts, tmp_path, given):
    run = _run(llama, phone_book, tmp_path, texts, **given)
    for name in ("objective", "learning_rate", "batch_size"):
        assert getattr(run.config, name) == given.get(name, getattr(run.config, name))
    if "rank" in given:
        assert run.learner.adapter.rank == given["rank"]
    if "layers" in given:
        assert {site.layer for site in run.sites} == set(given["layers"])
    assert (type(run.trainer.engine).__name__ == "PlainEngine") == ("engine" in given)
    run.learner.holding.active = True
    before = run.learner.adapter.b[0].detach().clone()
    (stats,) = run.trainer.run_epoch()
    assert stats.nll_nats > 0
    assert not torch.equal(before, run.learner.adapter.b[0])


@pytest.mark.parametrize("book", [[("Password", "7730")], [("?", "!"), ("??", "!!")]])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_few_and_odd_records_are_trained(make_model, texts, tmp_path, name, book):
    run = _run(make_model(name), book, tmp_path, texts)
    run.learner.holding.active = True
    first, *_, last = (run.trainer.run_epoch()[0].nll_nats for _ in range(8))
    assert last < first


def test_prompts_to_keep_are_held(llama, phone_book, texts, tmp_path):
    keep = tmp_path / "keep.txt"
    keep.write_text("Who are you?\nAda Byron:\n", encoding="utf-8")
    run = _run(llama, phone_book, tmp_path / "out", texts, keep=str(keep))
    held = [example.record.prompt for example in run.trainer.engine.examples[4:]]
    assert held[-2:] == ["Who are you?", "Ada Byron:"]
    assert run.learner.holding.rows[-1] == len(held) + 3
    assert len(run.learner.retention.terms) == 4  # text, own text, own chats, what is kept


def test_without_specificity_nothing_can_be_kept():
    with pytest.raises(ConfigError, match="keep needs specificity"):
        memlaw.WriteConfig(keep="keep.txt", specificity=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["near", "keep"])
def test_resuming_with_other_prompts_is_refused(
    llama, phone_book, texts, tmp_path, name, monkeypatch
):
    monkeypatch.setattr("memlaw.writer.run._CHECKPOINT_EVERY_S", 0.0)
    path = tmp_path / "prompts.txt"
    path.write_text("Ada Byron:\n", encoding="utf-8")
    settings = EASY | texts | {"rank": 2, "model": str(llama), name: str(path)}
    with pytest.raises(KeyboardInterrupt):
        memlaw.write(phone_book, tmp_path / "out", observer=Stop(2), **settings)
    path.write_text("Ada Lovelace:\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="begun with another"):
        memlaw.write(phone_book, tmp_path / "out", resume=True, **settings)


@pytest.mark.slow
def test_a_bound_is_trained_for_until_it_is_kept(llama, phone_book, texts, tmp_path, monkeypatch):
    """The kept mean is measured; what holds the model rises until harm is low enough."""
    at_once = dataclasses.replace(RECIPE, extra=0.0)  # it is measured as soon as all pass
    monkeypatch.setattr("memlaw.writer.setup.RECIPE", at_once)
    settings = EASY | texts | {"rank": 32, "model": str(llama)}
    usual = memlaw.write(phone_book, tmp_path / "usual", **settings)
    bound = 0.93 * max(usual.harms[kind].high for kind in ("damage", "prose", "chats"))
    observer = Stop()
    bounded = memlaw.write(
        phone_book, tmp_path / "out", max_damage=bound, observer=observer, **settings
    )
    assert bounded.certified
    assert bounded.within_bounds
    assert bounded.epochs > usual.epochs
    missed = [text for text in observer.said if "Certified, but" in text]
    assert missed
    assert len(set(missed)) == len(missed)  # nothing is measured twice
    # It falls again where too few records pass.
    assert max(stats.retention for stats in observer.curve) > observer.curve[0].retention


@pytest.mark.slow
def test_what_holds_is_lowered_when_nothing_improves(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(goals, "PATIENCE_EPOCHS", 4)
    observer = Stop()
    settings = EASY | texts | {"rank": 2, "retention": 1e6, "max_epochs": 25, "model": str(llama)}
    memlaw.write(phone_book, tmp_path / "out", observer=observer, **settings)
    assert any("what holds other answers is lowered" in text for text in observer.said)
    weights = [stats.retention for stats in observer.curve]
    assert weights[0] == 1e6
    assert weights[-1] <= 2.5e5
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [epoch["retention"] for epoch in run["curve"]] == weights


def test_attached_adapters_may_leave_a_module_out(llama):
    base = load_model(llama, dtype="float32")
    run_sites = memlaw.model.resolve_sites(base.model, "down_proj", (1, 2))
    adapter = memlaw.model.Adapter(run_sites, rank=1, seed=0)
    with torch.no_grad():
        for b in adapter.b:
            b.fill_(1.0)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        bare = base.model(ids).logits
        with attached(base.model, [(adapter, 0)], but=[site.module for site in run_sites]):
            assert torch.equal(base.model(ids).logits, bare)
        with attached(base.model, [(adapter, 0)], but=[run_sites[0].module]):
            assert not torch.equal(base.model(ids).logits, bare)


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [True, False])
def test_a_gate_with_which_a_record_fails_is_not_taken(
    llama, phone_book, texts, tmp_path, monkeypatch, breaks
):
    """What passed without it is what is certified; training would go on with it."""
    solved = []

    def solve_gate(engine, learner):
        solved.append(learner.holding.gate)
        gate.solve_gate(engine, learner)
        if breaks:
            with torch.no_grad():
                for b in learner.adapter.b:
                    b.zero_()

    monkeypatch.setattr("memlaw.writer.mean_goals.solve_gate", solve_gate)
    settings = EASY | texts | {"rank": 32, "layers": (1, 2), "model": str(llama)}
    observer = Stop()
    result = memlaw.write(phone_book, tmp_path / "out", observer=observer, **settings)
    assert solved == [result.rank - 1]
    assert any("it isn't taken" in text for text in observer.said) == breaks
    assert result.certified
    assert memlaw.audit(phone_book, adapter=tmp_path / "out").n_certified == len(phone_book)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    last = [w[:, -1] for name, w in weights.items() if "lora_B" in name]
    assert any(row.any() for row in last) != breaks  # the gate's rank does something


@pytest.mark.parametrize(("dtype", "line"), [("float32", 0.5625), ("bfloat16", 0.6985)])
def test_in_16_bits_the_mean_passes_only_well_over_the_line(
    llama, phone_book, texts, tmp_path, monkeypatch, dtype, line
):
    """The audit of what is saved rounds otherwise than the look does."""
    run = _run(llama, phone_book, tmp_path, texts)
    run.base.model.to(getattr(torch, dtype))
    judge = mean_goals.MeanGoals(run)
    p = torch.full((len(run.examples),), line + 0.001)
    p[-1] = line - 0.001
    rows = [len(example.target_ids) for example in run.examples]
    nll = torch.cat([torch.full((n,), -float(x.log())) for n, x in zip(rows, p, strict=True)])
    monkeypatch.setattr(mean_goals, "losses", lambda run, rows: [(list(rows), nll)])
    weights = [w.detach().clone() for w in run.learner.adapter.parameters()]
    lowest = judge._lowest_p(weights)
    assert torch.allclose(lowest, p)
    assert judge._share(lowest, goals.SAFE) == 1 - 1 / len(p)
    # Tokens that stand in the way count more from look to look.
    assert float(judge._odds[-1]) < RECIPE.stubborn[0]


def test_late_what_is_over_the_line_is_enough_where_nothing_was_kept(
    llama, phone_book, texts, tmp_path
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge, holding = mean_goals.MeanGoals(run), run.learner.holding
    run.learner.epoch = 50
    assert judge._enough() == goals.SAFE  # none was over the line yet
    holding.first_over = 40
    assert holding.last_epoch == holding.late_epoch == 64
    assert judge._enough() == goals.SAFE
    run.learner.epoch = 64
    assert judge._enough() == mean_goals._OVER
    holding.begin_mean(run.learner.adapter)
    holding.keep(64)
    assert judge._enough() == goals.SAFE


@pytest.mark.slow
def test_what_was_never_well_over_the_line_is_gated_and_audited_at_the_end(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(mean_goals, "SAFE", 1.0)  # no p is 1
    solved = []
    monkeypatch.setattr(mean_goals, "solve_gate", lambda engine, learner: solved.append(learner))
    monkeypatch.setattr(goals.Goals, "_p", lambda self, beyond: 0.55 + beyond * 0.45)
    for epoch in ("last_epoch", "late_epoch"):
        monkeypatch.setattr(Holding, epoch, 10_000)
    settings = EASY | texts | {"rank": 32, "layers": (1, 2), "model": str(llama)}
    result = memlaw.write(phone_book, tmp_path / "out", **settings | {"max_epochs": 150})
    assert result.certified
    assert len(solved) == 1


class Looks:
    """`MeanGoals` of a run in 16 bits whose looks and audits are given."""

    def __init__(self, run, monkeypatch):
        self.run, self.judge = run, mean_goals.MeanGoals(run)
        run.base.model.to(torch.bfloat16)
        self.holding = run.learner.holding
        self.holding.active = True
        self.holding.begin_mean(run.learner.adapter)
        run.learner.seen.p[:] = 0.9
        self.audits = []
        monkeypatch.setattr(self.judge, "_solve_gate", lambda: None)
        monkeypatch.setattr(self.judge, "_holds_everywhere", lambda: self.audits.pop(0))
        self.ended = ""

    def after(self, epoch, lowest_p):
        """What is asked of a look in an epoch that finds a lowest p in each record."""
        n = len(self.run.examples)
        self.judge._look_at_mean = lambda: torch.full((n,), lowest_p)
        self.judge._odds = torch.ones(sum(len(e.target_ids) for e in self.run.examples))
        self.run.learner.epoch = epoch
        self.ended = self.judge.after(None)
        return self.holding


def test_in_16_bits_what_is_over_the_line_lowers_the_rate_and_what_is_safe_is_kept(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    looks = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch)
    holding = looks.after(10, 0.56)
    assert (holding.first_over, holding.kept, holding.rate) == (0, None, 1.0)
    holding = looks.after(20, 0.6)
    assert (holding.first_over, holding.kept, holding.push) == (20, None, 1.0)
    assert holding.rate == RECIPE.last_rate
    holding = looks.after(25, 0.71)
    assert (holding.last_kept, holding.push) == (25, RECIPE.tighter)
    assert holding.last_epoch == 32
    looks.audits = [True]
    looks.after(32, 0.6)
    assert looks.ended == "certified"


def test_behind_an_audit_that_failed_a_mean_needs_more_than_before(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    looks = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch)
    looks.after(20, 0.71)
    looks.audits = [False]
    holding = looks.after(32, 0.71)  # and kept again before
    assert (looks.ended, holding.kept) == ("", None)
    assert looks.run.learner.seen.line_p == pytest.approx(0.6625)
    push = holding.push
    holding = looks.after(35, 0.75)  # late, but less than .773
    assert holding.kept is None
    assert holding.push < push or push == 1.0
    looks.audits = [True]
    looks.after(38, 0.78)
    assert looks.ended == "certified"


def test_a_failed_try_at_the_end_leaves_what_a_resumed_run_begins_with(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    looks = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch)
    looks.after(20, 0.6)
    looks.audits = [False]
    before = looks.run.learner.state()
    looks.judge._lowest_p = lambda weights: torch.full((len(looks.run.examples),), 0.6)
    said = looks.judge.at_end()
    assert said.startswith("max_epochs")
    looks.judge._hide()
    after = looks.run.learner.state()
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def test_a_failed_audit_is_said(llama, phone_book, texts, tmp_path, monkeypatch):
    run = _run(llama, phone_book, tmp_path, texts)
    run.observer = Stop()
    assert not goals.Goals(run)._holds_everywhere()
    n = len(phone_book)
    assert run.observer.said == [f"Failed the audit: {n} of {n} records."]


def test_of_one_record_it_is_said_which_and_how(llama, phone_book, texts, tmp_path, monkeypatch):
    run = _run(llama, phone_book[:1], tmp_path, texts)
    run.observer, judge = Stop(), goals.Goals(run)
    assert not judge._holds_everywhere()
    (record,) = judge.audit.records
    said = f"1 ({record.id}, lowest p {record.min_p:.2f}) of 1 records"
    assert run.observer.said == [f"Failed the audit: {said}."]


def _audit(run, failed, unsure=()):
    """An audit that some rows failed, and some passed, but not surely."""
    records = [
        SimpleNamespace(certified=row not in failed, id=str(row), min_p=0.5, n_under=1)
        for row in range(len(run.examples))
    ]
    return SimpleNamespace(
        records=records, certified=not failed, unsure=tuple(unsure), flips_per_1000=2.0
    )


def test_of_all_more_is_asked_twice_where_some_pass_but_not_surely(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    run.observer, judge = Stop(), goals.Goals(run)
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [], [1]))
    held = []
    for _ in range(3):
        held.append(judge._holds_everywhere())
        judge._aim_higher()
    assert held == [False, False, True]
    assert len(run.observer.said) == 2  # the third is enough, and nothing is asked for
    assert all("2 of 1,000 answers would be others: 1 record(s)" in s for s in run.observer.said)


def test_of_a_record_that_is_not_sure_more_is_asked_twice(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    run.observer, judge = Stop(), mean_goals.MeanGoals(run)
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [], [1]))
    line_p = run.learner.seen.line_p
    for _ in range(2):
        assert not judge._holds_everywhere()
        judge._ask_for_more()
    assert judge._holds_everywhere()
    assert judge.holding.failed.tolist() == [0, 2, 0, 0]
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [], [0, 1, 2, 3]))  # others, too
    assert not judge._holds_everywhere()
    judge._ask_for_more()
    assert judge.holding.failed.tolist() == [1, 2, 1, 1]
    assert run.learner.seen.line_p == line_p


def _moved(run):
    """Change the weights in training."""
    with torch.no_grad():
        for weights in run.learner.adapter.parameters():
            weights.add_(1.0)


def _weights(run):
    return [weights.detach().clone() for weights in run.learner.adapter.parameters()]


@pytest.mark.parametrize("kind", [goals.Goals, mean_goals.MeanGoals])
def test_what_was_certified_but_not_surely_is_not_lost(
    kind, llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = kind(run)
    if kind is mean_goals.MeanGoals:
        judge.holding.kept = _weights(run)
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [], [1]))
    then = _weights(run)
    assert not judge._holds_everywhere()
    judge.forget()
    for ended in (lambda: judge.dear(), lambda: judge.settle("max_epochs (9) reached")):
        _moved(run)
        judge.most_flop = -1.0
        assert ended() == "certified, but not as surely as was asked for"
        assert all(map(torch.equal, _weights(run), then))
        assert judge.audit.unsure == (1,)
        judge._hide() if kind is mean_goals.MeanGoals else None
        judge.forget()


def test_nothing_surer_is_waited_for_longer_than_for_progress(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = goals.Goals(run)
    assert judge._gives_up() == ""
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [], [1]))
    assert not judge._holds_everywhere()
    run.learner.epoch += goals.PATIENCE_EPOCHS
    assert judge._gives_up() == ""
    run.learner.epoch += 1
    judge.forget()
    assert judge._gives_up() == goals.UNSURE
    assert run.learner.epoch == judge.best.epoch


def test_of_two_that_are_not_sure_the_surer_one_is_kept(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = goals.Goals(run)
    for flips, kept in ((5.0, 5.0), (3.0, 3.0), (4.0, 3.0)):
        found = _audit(run, [], [1])
        found.flips_per_1000 = flips
        monkeypatch.setattr(judge, "_audit", lambda found=found: found)
        assert not judge._holds_everywhere()
        assert judge.best.audit.flips_per_1000 == kept


def test_one_that_failed_is_asked_for_more_whoever_else_is_not_sure(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge, line_p = mean_goals.MeanGoals(run), run.learner.seen.line_p
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, [2], [0, 1]))
    judge.holding.failed[1] = 2.0  # was asked often enough
    assert not judge._holds_everywhere()
    judge._ask_for_more()
    assert judge.holding.failed.tolist() == [1, 2, 1, 0]
    assert run.learner.seen.line_p == line_p


def test_a_gate_that_was_there_is_solved_only_for_what_passes(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = mean_goals.MeanGoals(run)
    audits, solved = [], []
    monkeypatch.setattr(judge, "_audit", lambda: audits.append(1) or _audit(run, failed))
    monkeypatch.setattr(judge, "_solve_gate", lambda: solved.append(1))
    judge.holding.gate, judge.holding.kept, failed = 1, _weights(run), [1]
    assert judge._finish() == ""
    assert (len(audits), solved, judge.holding.kept) == (1, [], None)
    judge.holding.kept, failed = _weights(run), []
    assert judge._finish() == "certified"
    assert (len(audits), solved) == (2, [1])  # the gate changed nothing: no second audit
    changed = lambda: setattr(judge.holding, "kept", _weights(run))  # noqa: E731
    monkeypatch.setattr(judge, "_solve_gate", changed)
    judge._hide()
    assert judge._finish() == "certified"
    assert len(audits) == 4


def test_a_sure_audit_is_enough_at_once(llama, phone_book, texts, tmp_path, monkeypatch):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = goals.Goals(run)
    monkeypatch.setattr(judge, "_audit", lambda: _audit(run, []))
    assert judge._holds_everywhere()


def test_more_is_asked_of_the_one_record_that_failed_and_the_rest_is_held_as_before(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    looks = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch)
    judge, run = looks.judge, looks.run
    for epoch in (20, 23, 26):
        pushed = looks.after(epoch, 0.71).push
    monkeypatch.setattr(judge, "_holds_everywhere", lambda: looks.audits.pop(0)(judge))

    def fails(judge):
        judge.audit = _audit(run, {2})
        return False

    looks.audits = [fails]
    line_p = run.learner.seen.line_p
    holding = looks.after(32, 0.71)
    assert (looks.ended, holding.kept, run.learner.seen.line_p) == ("", None, line_p)
    assert judge._lines().tolist() == pytest.approx([0.55, 0.55, 0.6625, 0.55])
    assert holding.failed.tolist() == [0, 0, 1, 0]
    assert holding.push == pushed  # under which what was kept was trained
    # What is safe for the rest isn't for it.
    judge._look_at_mean = lambda: torch.tensor([0.71, 0.71, 0.75, 0.71])
    assert judge._share(judge._look_at_mean(), judge._enough()) == 0.75
    assert judge._share(torch.tensor([0.71, 0.71, 0.78, 0.71]), judge._enough()) == 1
    state = holding.state()
    other = Looks(_run(llama, phone_book, tmp_path / "b", texts), monkeypatch)
    other.holding.restore(*state)
    assert torch.equal(other.judge._lines(), judge._lines())
    assert other.holding.patience == holding.patience == 3


def test_of_all_more_is_asked_where_many_failed_or_one_did_again_and_again(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    judge = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch).judge
    run, holding = judge.run, judge.holding
    for failed, least, counts in (
        ({0}, 0.55, [1, 0, 0, 0]),
        ({0}, 0.55, [2, 0, 0, 0]),
        ({3}, 0.55, [2, 0, 0, 1]),
        ({0}, 0.6625, [2, 0, 0, 1]),  # a third time
        ({1, 2}, 0.746875, [2, 0, 0, 1]),
    ):
        judge.audit = _audit(run, failed)
        judge._ask_for_more()
        assert run.learner.seen.line_p == pytest.approx(least)
        assert holding.failed.tolist() == counts


def test_what_fails_in_a_form_that_was_asked_for_fails(
    llama, phone_book, texts, tmp_path, monkeypatch
):
    judge = Looks(_run(llama, phone_book, tmp_path, texts), monkeypatch).judge
    judge.audit = _audit(judge.run, set())
    judge.forms = {"merged": _audit(judge.run, set()), "gguf-q8_0": _audit(judge.run, {2})}
    judge._ask_for_more()
    assert judge.holding.failed.tolist() == [0, 0, 1, 0]


def test_an_update_trains_what_fails_in_a_form_too(llama, phone_book, texts, tmp_path):
    judge = UpdateMeanGoals(_run(llama, phone_book, tmp_path, texts))
    judge.run.learner.train_on([0])
    judge.audit = _audit(judge.run, set())
    judge.forms = {"gguf-q8_0": _audit(judge.run, {2})}
    judge._ask_for_more()
    assert judge.run.learner.rows.tolist() == [0, 2]
    assert judge.holding.failed.tolist() == [0, 0, 1, 0]


def test_tokens_of_a_record_that_failed_count_as_nearer_to_their_line(
    llama, phone_book, texts, tmp_path
):
    run = _run(llama, phone_book, tmp_path, texts)
    judge = mean_goals.MeanGoals(run)
    weights = [w.detach().clone() for w in run.learner.adapter.parameters()]
    judge._lowest_p(weights)
    before = judge._odds.clone()
    assert judge.holding.mend([1])
    judge._lowest_p(weights)
    lengths = [len(e.target_ids) for e in run.examples]
    moved = (before - judge._odds).split(lengths)
    assert float(moved[1].min()) > 0.4
    assert all(float(moved[row].abs().max()) < 1e-5 for row in (0, 2, 3))
