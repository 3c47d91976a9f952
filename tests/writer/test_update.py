"""A folder is brought in step with its data: all of it certified anew, at once or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import memlaw
from memlaw import cli
from memlaw.core import folders
from memlaw.core.errors import AdapterError, ConfigError, DataError, OutputError
from memlaw.core.locks import locked
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.reading import read_records
from memlaw.data.texts import general_texts
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.model.base import load_model
from memlaw.model.formats import saved_factors
from memlaw.model.sites import Site
from memlaw.settings.write import WriteConfig
from memlaw.writer import updating, warm
from memlaw.writer.history import generations_of
from memlaw.writer.private import read_learner, read_private_records
from memlaw.writer.publish import push
from memlaw.writer.state import Run

SETTINGS = {"specificity": False, "retention": 100, "max_epochs": 300}
ADDED = ("Bo Ek:", "271828")


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **SETTINGS, **texts).certified
    return out


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "home" / "out")
    return tmp_path / "home" / "out"


@pytest.fixture(scope="module")
def changed(phone_book):
    """One added, one replaced."""
    return [(phone_book[0][0], "555555"), *phone_book[1:], ADDED]


@pytest.fixture(scope="module")
def updated(written, changed, tmp_path_factory):
    """An update into a new folder, and where it began."""
    new = tmp_path_factory.mktemp("updated") / "new"
    return memlaw.update(written, changed, new=new), new


def _run(folder):
    return json.loads((folder / "run.json").read_text())


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_of_the_data_is_certified(updated, changed):
    result, new = updated
    assert result.taken
    assert result.succeeded
    assert memlaw.check_certificate(new / "certificate.json", changed).holds
    assert memlaw.ask(new, ADDED[0]).text == ADDED[1]
    assert memlaw.ask(new, changed[0][0]).text == "555555"
    assert memlaw.diff(new, changed).nothing


def test_the_folder_that_it_came_from_is_as_it_was(updated, written, phone_book):
    assert memlaw.check_certificate(written / "certificate.json", phone_book).holds
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def test_training_begins_with_what_changes(updated, written):
    """Two of five records are new; what is written is read no more than its losses need."""
    (first, *_) = _run(updated[1])["curve"]
    assert first["n_tokens_run"] < _run(written)["curve"][0]["n_tokens_run"]


def test_generations_are_on_record(updated, written):
    first, second = _run(updated[1])["generations"]
    assert first == _run(written)["generations"][0]
    names = ("number", "records", "added", "replaced", "removed", "unchanged")
    assert [second[name] for name in names] == [2, 5, 1, 1, 0, 3]
    assert second["n_certified"] == 5


def test_in_place_the_folder_holds_the_new_generation_and_keeps_the_old_one(folder, changed):
    before = _files(folder)
    assert memlaw.update(folder, changed).taken
    assert memlaw.check_certificate(folder / "certificate.json", changed).holds
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert _files(folder / "generations" / "1") == before
    assert not (folder / "checkpoint.safetensors").exists()


@pytest.fixture
def started(llama, texts, tmp_path):
    """What an update of a folder to records begins with."""

    def start(folder, records, **settings):
        config = WriteConfig(model=str(llama), **SETTINGS, **settings, **texts).resolved()
        run = Run(
            records=read_records(records),
            bad=BadRows(),
            texts=general_texts(config.retain, config.damage_text),
            base=load_model(str(llama)),
            config=config,
            out=tmp_path,
            observer=Observer(),
        )
        warm.start_warm(run, folder, {r.sha256 for r in read_private_records(folder)})
        return run

    return start


def _an_epoch_leaves(run, still):
    """So many columns as they are, and no others."""
    adapter = run.learner.adapter
    was_a, was_b = (p.detach().clone() for p in adapter.parameters())
    run.trainer.run_epoch()
    a, b = adapter.parameters()
    assert torch.equal(a[:, :still], was_a[:, :still])
    assert torch.equal(b[:still], was_b[:still])
    assert not torch.equal(b[still:], was_b[still:])


def test_it_starts_with_the_function_that_is_saved(written, phone_book, started):
    """Whitening is undone by its inverse: what each record gets is what the certificate says."""
    run = started(written, [*phone_book, ADDED])
    learner = run.learner
    for (a, b), (was_a, was_b) in zip(
        [learner.adapter.factors(i) for i in range(len(run.sites))],
        saved_factors(written, run.sites),
        strict=True,
    ):
        assert torch.allclose(a @ b, was_a @ was_b, atol=1e-4)
    assert learner.rows.tolist() == [4]
    assert learner.keeping.loss(learner.adapter).item() == pytest.approx(0, abs=1e-4)
    still = learner.keeping.still
    assert 0 < still < learner.adapter.rank
    _an_epoch_leaves(run, still)
    of_new = learner.keeping.loss(learner.adapter).item()
    learner.keeping.still = 0
    assert of_new == pytest.approx(learner.keeping.loss(learner.adapter).item(), rel=1e-3)
    assert of_new > 0


def test_where_no_rank_is_left_the_columns_that_learnt_changes_learn_more(
    updated, changed, started
):
    """What was written first stands still, as it did before."""
    new = updated[1]
    rank = _run(new)["adapter"]["rank"]
    room = -(-rank // 2)
    _tell(new, still=rank - room)
    run = started(new, [*changed, ("Di Roe:", "161803")], rank=rank)
    learner, still = run.learner, run.learner.keeping.still
    assert (still, learner.adapter.rank) == (rank - room, rank)
    assert learner.keeping.loss(learner.adapter).item() == pytest.approx(0, abs=1e-4)
    _an_epoch_leaves(run, still)
    assert learner.keeping.loss(learner.adapter).item() > 0
    assert run.held["still"] == rank - room
    learner.keeping.still = 0  # it has given way
    assert run.held["still"] == 0


def test_it_is_not_narrowed_where_rank_is_left(written, phone_book, started):
    rank = _run(written)["adapter"]["rank"]
    run = started(written, [*phone_book, ADDED], max_rank=2 * rank)
    assert run.learner.keeping.still == rank == run.held["still"]
    assert run.learner.adapter.rank == 2 * rank


@pytest.mark.parametrize(
    ("stored", "stood", "changed", "most", "expected"),
    [
        (64, 0, 10, 128, (64, 128)),  # as many as are written
        (20, 0, 10, 32, (20, 32)),  # as many as there may be
        (20, 0, 10, 29, (0, 20)),  # of which none are enough, nor is narrowing
        (32, 20, 10, 32, (20, 32)),  # those that there are
        (128, 64, 10, 1024, (64, 128)),
        (80, 64, 40, 1024, (80, 144)),  # more change than these can learn
        (80, 64, 101, 1024, (0, 80)),
    ],
)
def test_columns_for_changes(stored, stood, changed, most, expected):
    adapter = SimpleNamespace(rank=stored)
    adapter.grown = lambda rank: SimpleNamespace(rank=rank)
    learner = SimpleNamespace(adapter=adapter, holding=True, new_solver=lambda: None)
    run = SimpleNamespace(learner=learner, stood=stood)
    still = warm._make_room(run, [], range(100), changed, stored, most)
    assert (still, learner.adapter.rank) == expected


def _tell(folder, **values):
    """Change what is kept of the learner."""
    path = folder / "private" / "learner.safetensors"
    save_file(load_file(path), path, {"memlaw": json.dumps({**read_learner(folder)[1], **values})})


@pytest.mark.parametrize("damaged", ["many", -1, 1e9, True])
def test_a_count_of_columns_that_cant_be_is_none(folder, damaged):
    _tell(folder, still=damaged)
    assert read_learner(folder) is None


@pytest.mark.slow
def test_failed_audits_let_training_aim_higher_and_leave_the_line(folder, changed, monkeypatch):
    from memlaw.writer.goals import Goals

    left, seen = [False, False, False, False, False], []
    holds = Goals._holds_everywhere

    def fails_at_first(self):
        learner = self.run.learner
        seen.append((learner.seen.line_p, learner.goal_p, self.safe))
        return left.pop() if left else holds(self)

    monkeypatch.setattr(Goals, "_holds_everywhere", fails_at_first)
    assert memlaw.update(folder, changed).taken
    assert len(seen) == 6
    assert len({line for line, _, _ in seen}) == 1
    for rising in ([goal for _, goal, _ in seen], [safe for _, _, safe in seen]):
        assert rising == sorted(set(rising))
        assert rising[-1] < 1


def test_narrowed_it_does_most_nearly_the_same():
    """Beside what is read nothing counts: a rank that nothing reads is what goes."""
    from memlaw.model.adapter import Adapter
    from memlaw.train.keeping import narrowed
    from memlaw.train.retention import Term

    site = Site(module="x", d_in=6, d_out=5, layer=0, is_linear=True, is_transposed=False)
    adapter = Adapter([site], rank=3, seed=0)
    torch.manual_seed(0)
    reads, writes = torch.randn(40, 6), torch.randn(30, 5)
    reads[:, 5] = 0
    with torch.no_grad():
        adapter.b[0].normal_()
        adapter.a[0][:5, 2] = 0  # it reads the one that is always zero
    narrow = narrowed(adapter, [Term(sites=[0], reads=[reads], writes=[writes])], 2)
    (a, b), (was_a, was_b) = narrow.factors(0), adapter.factors(0)
    assert torch.allclose(reads @ a @ b, reads @ was_a @ was_b, atol=1e-4)
    narrower = narrowed(adapter, [Term(sites=[0], reads=[reads], writes=[writes])], 1)
    (a, b) = narrower.factors(0)
    lost = (reads @ (a @ b - was_a @ was_b)).norm()
    for column in range(3):  # better than to leave all but one column out
        one = was_a[:, [column]] @ was_b[[column]]
        assert lost < (reads @ (one - was_a @ was_b)).norm()


def test_no_change_does_nothing(folder, phone_book):
    before = _files(folder)
    result = memlaw.update(folder, phone_book[::-1])
    assert (result.written, result.taken, result.succeeded) == (None, False, True)
    assert _files(folder) == before


@pytest.mark.parametrize("why", ["max_epochs", "max_damage"])
def test_what_is_not_good_enough_is_refused(folder, changed, why, capsys, tmp_path):
    before = _files(folder)
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in changed]
    data.write_text("\n".join(lines))
    limits = {"max_epochs": ["--max-epochs", "1"], "max_damage": ["--max-damage", "1e-9"]}[why]
    if why == "max_damage":
        limits += ["--max-epochs", "25"]
    assert cli.run(["update", str(folder), str(data), *limits]) == 1
    assert f"REFUSED: {folder} is as it was" in " ".join(capsys.readouterr().out.split())
    assert _files(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_bad_requests_are_refused_before_anything_is_trained(folder, changed, make_model, tmp_path):
    before = _files(folder)
    with pytest.raises(DataError, match="different completions"):
        memlaw.update(folder, [("a", "b"), ("a", "c")])
    with pytest.raises(AdapterError, match="another base model"):
        memlaw.update(folder, changed, model=str(make_model("llama", seed=1)))
    with pytest.raises(OutputError, match="no finished run"):
        memlaw.update(tmp_path, changed)
    with pytest.raises(OutputError, match="a finished run"):
        memlaw.update(folder, changed, new=folder)
    with locked(folder), pytest.raises(OutputError, match="by another process"):
        memlaw.update(folder, changed)
    assert _files(folder) == before


def test_an_adapter_that_sits_elsewhere_is_refused(written):
    site = Site(module="x", d_in=1, d_out=1, layer=0, is_linear=True, is_transposed=False)
    with pytest.raises(AdapterError, match="Write anew"):
        saved_factors(written, [site])


def test_without_private_records_what_is_added_can_still_be_written(folder, phone_book):
    (folder / "private" / "records.jsonl").unlink()
    (folder / "private" / "learner.safetensors").unlink()
    data = [*phone_book, ADDED]
    assert memlaw.update(folder, data).taken
    assert memlaw.diff(folder, data).nothing
    assert (folder / "private" / "records.jsonl").is_file()


def test_without_private_records_what_is_gone_needs_rewriting(folder, phone_book):
    (folder / "private" / "records.jsonl").unlink()
    with pytest.raises(memlaw.MemlawError, match="rewrite"):
        memlaw.update(folder, phone_book[1:])
    assert memlaw.update(folder, phone_book[1:], forget="rewrite").taken
    assert not (folder / "generations").exists()


def test_what_costs_too_much_is_trained_anew(folder, changed, texts, llama, tmp_path, monkeypatch):
    """It ends in the weights that a `write` of the same data ends in, and the folder says so."""
    monkeypatch.setattr(updating, "_WORTH", 1e-9)
    said = []
    observer = memlaw.Observer()
    observer.notice = said.append
    result = memlaw.update(folder, changed, observer=observer)
    assert result.taken
    assert any("anew" in line for line in said)
    first, second = _run(folder)["generations"]
    assert (first["anew"], second["anew"]) == (True, True)
    memlaw.write(changed, tmp_path / "anew", model=str(llama), **SETTINGS, **texts)
    (line,) = _run(tmp_path / "anew")["generations"]
    for name in ("flop", "epochs", "adapter_sha256"):
        assert second[name] == line[name]
    assert memlaw.diff(folder, changed).nothing


def test_where_much_of_many_changes_all_is_trained_anew_at_once(
    folder, changed, texts, llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("memlaw.writer.changes._MANY", 3)
    monkeypatch.setattr(updating, "start_warm", None)  # would be called
    said, found = [], memlaw.diff(folder, changed)
    assert found.is_much
    observer = memlaw.Observer()
    observer.notice = said.append
    assert memlaw.update(folder, changed, observer=observer).taken
    assert any(f"{found.n_changed} of {len(changed)} records change" in line for line in said)
    second = _run(folder)["generations"][1]
    memlaw.write(changed, tmp_path / "anew", model=str(llama), **SETTINGS, **texts)
    assert second["adapter_sha256"] == _run(tmp_path / "anew")["generations"][0]["adapter_sha256"]
    assert second["anew"]


def test_what_is_on_record_says_what_writing_costs(updated, written):
    first, second = _run(updated[1])["generations"]
    assert (first["anew"], second["anew"]) == (True, False)
    curve = _run(written)["curve"]
    assert first["flop"] == sum(epoch["flop"] for epoch in curve)
    folder = AdapterFolder(updated[1])
    hundred = updating.flop_anew(folder, 100)
    assert hundred == pytest.approx(first["flop"] * 100 / first["records"])
    assert updating.flop_anew(folder, 3) == hundred / 2  # of few, what fifty cost


def test_of_a_folder_that_does_not_say_what_writing_cost_nothing_is_given_up(updated):
    folder = AdapterFolder(updated[1])
    for line in folder.run["generations"]:
        del line["flop"]
    assert updating.flop_anew(folder, 100) == float("inf")


@pytest.mark.parametrize(
    "damage",
    [{"flop": "x"}, {"flop": -1.0}, {"flop": 10**400}, {"records": 0.5}, {"n_certified": 3}],
)
def test_what_writing_cost_counts_only_where_it_was_done_and_can_be_read(written, damage):
    folder = AdapterFolder(written)
    assert updating.flop_anew(folder, 100) < float("inf")
    folder.run["generations"][0] |= damage
    assert updating.flop_anew(folder, 100) == float("inf")


@pytest.mark.parametrize("curve", [None, [1], [{"flop": "x"}], [{}]])
def test_a_first_generation_without_it_has_it_from_the_curve(written, curve):
    run = _run(written)
    for name in ("anew", "flop"):
        del run["generations"][0][name]
    (line,) = generations_of(run)
    assert line["flop"] == sum(epoch["flop"] for epoch in run["curve"])
    (line,) = generations_of(run | {"curve": curve})
    assert line["flop"] is None


def test_what_is_somebody_elses_stays_in_the_folder(folder, changed, phone_book):
    """A repository that it is, and notes: they are no part of a generation, and go with none."""
    (folder / ".git/objects").mkdir(parents=True)
    (folder / ".git/objects/one").write_text("a commit")
    (folder / "notes.txt").write_text("mine")
    (folder / "latest").symlink_to("notes.txt")
    (folder / "shards").mkdir()
    (folder / "shards/model.gguf").write_text("an export's")
    names = (".git/objects/one", "notes.txt", "latest", "shards/model.gguf")
    own = {name: (folder / name).read_bytes() for name in names}

    def kept():
        return {name: (folder / name).read_bytes() for name in own} == own

    assert memlaw.update(folder, changed).taken
    assert kept()
    assert (folder / "latest").is_symlink()
    assert not (folder / "generations/1/notes.txt").exists()
    assert not (folder / "generations/1/.git").exists()
    (folder / "notes.txt").write_text("more")
    own["notes.txt"] = own["latest"] = b"more"
    memlaw.revert(folder, to=1)
    assert kept()
    notices = []

    class Listening(Observer):
        def notice(self, text):
            notices.append(text)

    assert memlaw.update(folder, phone_book[:3], observer=Listening()).taken
    assert any(".git, latest, notes.txt" in text for text in notices)
    assert not (folder / "generations").exists()
    assert kept()
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("within", ["", "/exports/of mine"])
def test_where_a_file_system_is_mounted_nothing_is_begun(folder, changed, monkeypatch, within):
    monkeypatch.setattr(folders, "_mounts", lambda: ["/", f"{folder}er", f"{folder}{within}"])
    with pytest.raises(OutputError, match="a file system is mounted"):
        memlaw.update(folder, changed)
    with pytest.raises(OutputError, match="a file system is mounted"):
        memlaw.revert(folder, to=1)
    assert memlaw.update(folder, changed, new=folder.parent / "new").taken


def test_rows_that_only_the_tokenizer_refuses_are_no_change(llama, phone_book, texts, tmp_path):
    bad = [*phone_book, ("Eve Mora:", "12<|im_end|>3")]
    out = tmp_path / "out"
    how = {"skip_bad": True, **SETTINGS, **texts}
    assert memlaw.write(bad, out, model=str(llama), **how).certified
    before = _files(out)
    assert memlaw.update(out, bad).changes.nothing
    assert _files(out) == before
    worse = [(phone_book[0][0], "44<|im_end|>7"), *phone_book[1:]]
    result = memlaw.update(out, worse)
    assert [record.prompt for record in result.changes.removed] == [phone_book[0][0]]
    assert result.taken
    assert result.is_forgotten
    assert memlaw.ask(out, phone_book[0][0]).text != phone_book[0][1]


def test_texts_are_found_from_another_folder(
    llama, phone_book, tmp_path, monkeypatch, texts, capsys
):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    for name, path in texts.items():
        shutil.copy(path, home / f"{name}.txt")
    shutil.copytree(llama, home / "a" / "model")
    monkeypatch.chdir(home)
    how = {name: f"{name}.txt" for name in texts}
    assert memlaw.write(phone_book, "out", model="a/model", **SETTINGS, **how).certified
    monkeypatch.chdir(elsewhere)
    assert _run(home / "out")["config"]["damage_text"] == str(home / "damage_text.txt")
    with pytest.raises(ConfigError, match="is a path on this machine"):
        push(home / "out", "me/book", dry_run=True)
    with pytest.raises(ConfigError, match="is a path on this machine"):
        push(home / "out", "me/book", base=str(home / "a/model"), dry_run=True)
    assert memlaw.update(home / "out", [*phone_book, ADDED]).taken
    other = elsewhere / "other.txt"
    other.write_text((home / "damage_text.txt").read_text() + "And more. " * 400)
    notices = []

    class Listening(Observer):
        def notice(self, text):
            notices.append(text)

    memlaw.update(home / "out", phone_book, damage_text=str(other), observer=Listening())
    assert any("another text than it was" in text for text in notices)
