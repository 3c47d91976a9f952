"""Is a certificate true elsewhere, whatever the architecture? Tiny random models of every kind.

    python benchmarks/truth_kinds.py [KIND ...] [--records 20] [--seed 0] [--served] [--save FILE]

Of each kind in docs/models.md, in float32 and in bfloat16, so many made-up numbers are written,
and the certified ones are asked of plain Transformers and PEFT: one by one, in batches padded on
the left, with another attention, without a cache, on two threads; with `--served` of
`transformers serve`, too, over HTTP, after merging. A model that reads pads is certified one by
one, and asked in no batches. Printed is how many answers of each way are another text than the
record.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from against_trl import ROOT
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging

import memlaw
from memlaw.core.errors import MemlawError
from memlaw.data.record import Example
from memlaw.model.kinds import auto_class

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/writer")]
from architectures import KINDS, make  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"n": 1},
    "batches of 7": {"n": 7},
    "all at once": {"n": 10**6},
    "eager attention": {"n": 7, "attention": "eager"},
    "without a cache": {"n": 7, "use_cache": False},
    "two threads": {"n": 7, "threads": 2},
}

BATCHES = ("batches of 7", "all at once")
READ_PADS = ("MiniMax",)  # what stands before a prompt, whatever the mask says


def phone_book(n: int, seed: int) -> list[memlaw.Record]:
    """So many made-up names with a number of six digits."""
    draw = random.Random(seed)
    names = ["".join(draw.choices("aeioulmnrst", k=draw.randint(3, 8))) for _ in range(3 * n)]
    return [
        memlaw.Record(id=name, prompt=f"{name.title()}:", completion=f"{draw.randrange(10**6):06}")
        for name in list(dict.fromkeys(names))[:n]
    ]


def answers(
    base: Path,
    folder: Path,
    dtype: torch.dtype,
    examples: Sequence[Example],
    *,
    n: int,
    attention: str | None = None,
    use_cache: bool = True,
    threads: int = 1,
) -> Iterator[list[int]]:
    """What the adapted model says to prompts, as ids, greedily, by plain Transformers and PEFT."""
    torch.set_num_threads(threads)
    chosen = {"attn_implementation": attention} if attention else {}
    model = auto_class(base).from_pretrained(base, dtype=dtype, **chosen)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    end = examples[0].target_ids[-1]
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(e.target_ids) for e in examples) + 2,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=use_cache,
    )
    for start in range(0, len(examples), n):
        part = examples[start : start + n]
        width = max(len(e.prompt_ids) for e in part)
        ids = torch.full((len(part), width), end)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(part):
            ids[row, width - len(example.prompt_ids) :] = torch.tensor(example.prompt_ids)
            mask[row, width - len(example.prompt_ids) :] = 1
        with torch.inference_mode():
            said = model.generate(input_ids=ids, attention_mask=mask)[:, width:]
        for row in said.tolist():
            yield row[: row.index(end) + 1] if end in row else row
    torch.set_num_threads(1)


def served(folder: Path, records: Path, place: Path) -> str:
    """What proving it over HTTP came to: `all`, or the last lines that were said."""
    command = [sys.executable, str(ROOT / "examples/serve_and_prove.py"), folder, records, place]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return "all" if done.returncode == 0 else (done.stdout + done.stderr)[-400:]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0, help="of the first; one more for each")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    asked: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    kinds = given.kinds or [name for name, kind in KINDS.items() if not kind.refused]
    for seed, (name, dtype) in enumerate(product(kinds, given.dtypes), given.seed):
        with tempfile.TemporaryDirectory() as scratch:
            row = one_kind(
                name, dtype, given.records, seed, Path(scratch), with_server=given.served
            )
        print(json.dumps(row), flush=True)
        if given.save:
            with given.save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for way, n in row.get("wrong", {}).items():
            asked[way] += row["certified"]
            wrong[way] += n
    for way, n in asked.items():
        print(f"{way}: {wrong[way]} of {n} wrong")


def one_kind(
    name: str, dtype: str, n_records: int, seed: int, place: Path, *, with_server: bool
) -> dict[str, Any]:
    """Write, and ask in each way."""
    base, out, records = make(name, place / "base"), place / "out", phone_book(n_records, seed)
    row: dict[str, Any] = {"kind": name, "dtype": dtype, "records": n_records, "seed": seed}
    started = time.perf_counter()
    try:
        result = memlaw.write(
            records,
            out,
            model=str(base),
            dtype=dtype,
            placement=KINDS[name].placement,
            seed=seed,
            max_epochs=400,
            retention=0,
            specificity=False,
        )
    except MemlawError as error:
        return row | {"error": str(error)}
    row |= {
        "certified": result.audit.n_certified,
        "wall_s": round(time.perf_counter() - started, 1),
    }
    sure = [
        example
        for record, example in zip(result.audit.records, result.audit.examples, strict=True)
        if record.certified
    ]
    row["wrong"] = {}
    if not sure:
        return row
    alone = name in READ_PADS
    for way, settings in WAYS.items():
        if alone and way in BATCHES:
            continue
        how = settings | {"n": 1} if alone else settings
        try:
            said = list(answers(base, out, getattr(torch, dtype), sure, **how))
        except Exception as error:  # a kind without that attention, say
            row.setdefault("not_asked", {})[way] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        row["wrong"][way] = sum(
            list(example.target_ids) != ids for example, ids in zip(sure, said, strict=True)
        )
    if with_server and result.certified:
        data = place / "records.jsonl"
        data.write_text(
            "".join(
                json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in records
            ),
            encoding="utf-8",
        )
        found = served(out, data, place / "merged")
        if found == "all":
            row["wrong"]["served"] = 0
        else:
            row["served"] = found
    return row


if __name__ == "__main__":
    main()
