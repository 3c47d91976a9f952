"""Is a certificate true elsewhere? Certified records, asked of plain Transformers and PEFT.

    python benchmarks/truth.py FOLDER DATA [FOLDER DATA ...] [--save FILE]

Each FOLDER is one that `memlaw write` made of the records in DATA, in bfloat16, on a model with a
chat template that names no date. What its certificate says is recited is asked for by `generate`,
with nothing of memlaw's in the way but the reading of DATA: one by one, in batches padded on the
left, with another attention, in another dtype. Printed is how many records of each way's are
another text than the record, and which.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw

WAYS: dict[str, dict[str, Any]] = {
    "batches of 64": {"n": 64},
    "one by one": {"n": 1},
    "batches of 7": {"n": 7},
    "eager attention, 64": {"n": 64, "attention": "eager"},
    "without a cache, 64": {"n": 64, "use_cache": False},
    "float32, 64": {"n": 64, "dtype": torch.float32},
}


def answers(
    folder: Path,
    prompts: list[str],
    longest: int,
    *,
    n: int,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.bfloat16,
    use_cache: bool = True,
) -> Iterator[str]:
    """What an adapted model says to prompts, greedily, by plain Transformers."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    base = run["base"]["path"]
    words = AutoTokenizer.from_pretrained(base, padding_side="left")
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=attention)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    texts = [
        words.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    for start in range(0, len(texts), n):
        asked = words(
            texts[start : start + n], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.inference_mode():
            said = model.generate(
                **asked, max_new_tokens=longest, do_sample=False, use_cache=use_cache
            )
        yield from words.batch_decode(
            said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )


def folders_given(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; `what` becomes pairs of a folder and its data."""
    parser.add_argument("what", nargs="+", type=Path, metavar="FOLDER DATA")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    if len(given.what) % 2:
        parser.error("each FOLDER needs the DATA that it was written of behind it")
    if missing := [str(path) for path in given.what if not path.exists()]:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    given.what = list(zip(given.what[::2], given.what[1::2], strict=True))
    return given


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    given = folders_given(parser)
    totals = dict.fromkeys(given.ways, 0)
    n_all = 0
    for folder, data in given.what:
        certificate = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
        if (certificate["dtype"], certificate["prompt_format"]) != ("bfloat16", "chat"):
            raise SystemExit(f"{folder}: only certificates in bfloat16, of chats, are asked here.")
        if not certificate["certified"]:
            raise SystemExit(f"{folder}: not all of its records are certified.")
        line = certificate["threshold"] + certificate["margin"]
        records = memlaw.read_records(data)
        longest = max(len(r.completion.encode()) for r in records) + 2  # no token is shorter
        n_all += len(records)
        for way in given.ways:
            started = time.perf_counter()
            said = answers(folder, [str(r.prompt) for r in records], longest, **WAYS[way])
            pairs = zip(records, said, strict=True)
            wrong = [
                (str(r.prompt), r.completion, text) for r, text in pairs if text != r.completion
            ]
            totals[way] += len(wrong)
            row = {
                "folder": folder.name,
                "line": line,
                "way": way,
                "records": len(records),
                "wrong": wrong,
                "wall_s": round(time.perf_counter() - started, 1),
            }
            print(json.dumps(row), flush=True)
            if given.save:
                with given.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    for way, n in totals.items():
        print(f"{way}: {n} of {n_all} wrong")


if __name__ == "__main__":
    main()
