"""A task for lm-eval: the records as a benchmark that its harness asks, in its own way.

What is written holds the records' text. The prompts are the very texts that were audited.
"""

from __future__ import annotations

import json
from pathlib import Path

from memlaw.core.errors import AdapterError
from memlaw.core.files import write_json, write_text
from memlaw.measure.decode import decoded_text
from memlaw.measure.examine import Audit

TASK = "memlaw_records"
_DATA = "records.jsonl"


def write_task(audit: Audit, folder: Path) -> None:
    """Write the task's settings (YAML, of which JSON is a part) and its data.

    Args:
        audit: whose records it is of.
        folder: to write to; it exists.

    Raises:
        AdapterError: a prompt's tokens aren't those of its text, so lm-eval would ask another.
    """
    rows = []
    for example in audit.examples:
        text = decoded_text(audit.tokenizer, example.prompt_ids)
        again = audit.tokenizer(text, add_special_tokens=False)["input_ids"]
        if tuple(again) != example.prompt_ids:
            raise AdapterError(
                f"record {example.record.id}: lm-eval asks by text, and its prompt's text is read "
                "back as other tokens. Ask a server instead (memlaw audit --endpoint)."
            )
        rows.append({"id": example.record.id, "prompt": text, "target": example.record.completion})
    end = decoded_text(audit.tokenizer, [audit.examples[0].target_ids[-1]])
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": _DATA}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "generation_kwargs": {
            "until": [end],
            "do_sample": False,
            "max_gen_toks": max(r.n_tokens for r in audit.records),
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    write_text(folder / _DATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / f"{TASK}.yaml", task)
