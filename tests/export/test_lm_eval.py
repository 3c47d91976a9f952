"""The task for lm-eval: its harness asks what was audited, and counts what was recited."""

import importlib.util
import json

import pytest

import memlaw
from memlaw.core.errors import AdapterError
from memlaw.export.lm_eval import TASK, write_task
from memlaw.export.run import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(llama, phone_book, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm_eval") / "out"
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    return out


def test_the_task_asks_the_very_prompts_that_were_audited(folder, phone_book, tmp_path):
    found = export(folder, tmp_path / "to", phone_book, to="lm-eval")
    rows = [json.loads(line) for line in (tmp_path / "to/records.jsonl").read_text().splitlines()]
    assert [row["target"] for row in rows] == [answer for _, answer in phone_book]
    tokenizer = found.before.tokenizer
    for row, example in zip(rows, found.before.examples, strict=True):
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert tuple(ids) == example.prompt_ids
    task = json.loads((tmp_path / "to" / f"{TASK}.yaml").read_text())
    assert task["generation_kwargs"]["until"] == ["<|im_end|>"]


def test_a_prompt_that_its_text_does_not_give_back_is_refused(folder, phone_book, tmp_path):
    audit = memlaw.audit(phone_book, adapter=folder)
    usual = audit.tokenizer

    class Other:
        def __getattr__(self, name):
            return getattr(usual, name)

        def __call__(self, text, **how):
            return {"input_ids": [1, 2]}

    object.__setattr__(audit, "tokenizer", Other())
    with pytest.raises(AdapterError, match="other tokens"):
        write_task(audit, tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
def test_the_harness_counts_what_is_recited(folder, llama, phone_book, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    export(folder, tmp_path / "to", phone_book, to="lm-eval")
    monkeypatch.chdir(tmp_path / "to")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def score(**model):
        args = {"pretrained": str(llama), "dtype": "float32", **model}
        tasks = TaskManager(include_path=".", include_defaults=False)
        how = {"tasks": [TASK], "task_manager": tasks, "device": "cpu", "bootstrap_iters": 0}
        found = simple_evaluate(model="hf", model_args=args, batch_size=4, **how)
        return found["results"][TASK]["exact_match,none"]

    assert score(peft=str(folder)) == 1.0
    assert score() == 0.0  # the bare model
