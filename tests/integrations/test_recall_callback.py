"""RecallCallback: stops at the certificate, keeps the best, trusts nothing but the folder."""

import json

import pytest

pytest.importorskip("trl", reason="the extra trl is not installed")

from stepping import RECORDS, adapter_of, build
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import memlaw
from memlaw.core.errors import ConfigError, DataError
from memlaw.integrations.recall import RecallCallback
from memlaw.integrations.trained import trained_targets, training_rows, untrained

THREE = RECORDS[:3]


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    return training_rows(THREE, chat_tokenizer)


@pytest.fixture
def make(llama, tmp_path, rows):
    usual = {"optim": "adamw_torch", "learning_rate": 2e-2, "max_grad_norm": 1.0}
    usual |= {"num_train_epochs": 60, "max_steps": -1, "logging_steps": 1000}
    return lambda **settings: build("trl", llama, tmp_path / "out", rows, **usual | settings)


@pytest.mark.slow
def test_training_ends_at_a_certificate_that_holds(make, tmp_path, monkeypatch):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Tracker)  # or wandb, or any other
    trainer = make(report_to=["trackio"])
    watch = RecallCallback(trainer, THREE, every=2)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.certificate.certified
    assert trainer.state.epoch < 60
    assert watch.audits[-1]["certified"]
    assert watch.audits[-1]["epoch"] == round(trainer.state.epoch)
    check = memlaw.check_certificate(tmp_path / "out/recall/certificate.json", THREE)
    assert check.holds
    last = watch.audits[-1]  # the callback's figures are the certificate's
    assert (last["recall"], last["share_under"], check.audit.n_certified) == (1, 0, len(THREE))
    lowest = min(record.min_p for record in check.audit.records)
    assert last["lowest_p"] == pytest.approx(lowest, abs=1e-4)
    logged = [entry for entry in trainer.state.log_history if "recall" in entry]
    assert [entry["recall"] for entry in logged] == [a["recall"] for a in watch.audits]
    assert logged[0]["recall"] < 1
    names = {"recall", "share_under", "lowest_p", "delta_nll"}
    assert names <= set(logged[0])
    seen = [logs for logs in told if "recall" in logs]
    assert [{n: logs[n] for n in names} for logs in seen] == [
        {n: audit[n] for n in names} for audit in watch.audits
    ]


@pytest.mark.slow
def test_the_best_adapter_is_kept_not_the_last_and_certified_as_far_as_it_goes(make, tmp_path):
    trainer = make(num_train_epochs=3)
    watch = RecallCallback(trainer, THREE, damage=False)
    scores = iter([(1, 5), (2, 9), (0, 1)])
    usual, kept = watch._audit, []

    class Scored:
        def __init__(self, audit, score):
            self.audit, (self.n_recalled, self.n_under) = audit, score

        def __getattr__(self, name):
            return getattr(self.audit, name)

    def audit(model):
        kept.append(adapter_of(trainer))
        return Scored(usual(model), next(scores))

    watch._audit = audit
    trainer.add_callback(watch)
    trainer.train()
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out/recall/adapter_model.safetensors")
    name = next(iter(kept[0]))
    stored = found[name.replace(".default", "")]
    assert [bool((stored == k[name]).all()) for k in kept] == [False, True, False]
    said = json.loads((tmp_path / "out/recall/certificate.json").read_text())
    assert said["certified"] is False
    assert said["n_records"] == 3
    left = {p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")}
    assert not left


@pytest.mark.slow
def test_a_folder_that_does_not_hold_up_is_trained_on(make, monkeypatch):
    """What the trainer sees decides nothing: only what the folder gives when it is loaded."""
    import memlaw.integrations.recall as recall

    trainer = make()
    watch = RecallCallback(trainer, THREE, damage=False)
    usual, n_refused = recall.certify_adapter, 2

    def refuses(*args, **kwargs):
        nonlocal n_refused
        found = usual(*args, **kwargs)
        if n_refused:
            n_refused -= 1
            object.__setattr__(found, "certified", False)
        return found

    monkeypatch.setattr(recall, "certify_adapter", refuses)
    trainer.add_callback(watch)
    trainer.train()
    assert [a["refuted"] for a in watch.audits].count(True) == 2
    assert watch.audits[-1]["certified"]
    assert trainer.threshold == pytest.approx(0.9)  # 0.6, then half the way to 1, twice


def test_what_a_trainer_trains_is_found_packed_or_not(rows, chat_tokenizer):
    from memlaw.data.encoding import encode
    from memlaw.data.reading import read_records

    examples = encode(read_records(THREE), chat_tokenizer, format="chat")
    assert untrained(examples, trained_targets(rows)) == []
    joined = {
        "input_ids": [i for row in rows for i in row["input_ids"]],
        "labels": [i for row in rows for i in row["labels"]],
        "seq_lengths": [len(row["labels"]) for row in rows],
    }
    assert untrained(examples, trained_targets([joined])) == []
    del joined["seq_lengths"]
    assert untrained(examples, trained_targets([joined])) == ["record:2", "record:3"]
    assert untrained(examples, trained_targets(rows[:2])) == ["record:3"]
    short = [{**row, "labels": [*row["labels"][:-1], -100]} for row in rows]
    assert len(untrained(examples, trained_targets(short))) == 3
    assert trained_targets([{"input_ids": [1]}]) is None


@pytest.mark.slow
def test_records_that_the_trainer_trains_otherwise_are_refused(make):
    trainer = make()
    with pytest.raises(DataError, match=r"tokens that 1 of 4 record.*training_rows"):
        RecallCallback(trainer, [*THREE, ("Somebody else:", "1")])
    with pytest.raises(ConfigError, match="every is 0"):
        RecallCallback(trainer, THREE, every=0)


@pytest.mark.slow
def test_bare_prompts_are_audited_as_bare_prompts(llama, tmp_path, chat_tokenizer):
    rows = training_rows(THREE, chat_tokenizer, prompt_format="plain")
    trainer = build("trl", llama, tmp_path / "out", rows)
    assert RecallCallback(trainer, THREE).format == "plain"


@pytest.mark.slow
def test_a_model_without_an_adapter_is_refused(make):
    trainer = make()
    trainer.model = trainer.model.get_base_model()
    with pytest.raises(ConfigError, match="peft_config"):
        RecallCallback(trainer, THREE)
