"""Is a token with p > 0.5 always the one that greedy decoding takes? A search for counterexamples.

    python benchmarks/threshold.py run      # three quarters of an hour of one core
    python benchmarks/threshold.py table    # the result as Markdown

Within one forward pass the rule is arithmetic: what has more than half of the probability has the
highest logit. But p is measured in one pass and decoding is another: other dtype, other batch
size, one token at a time instead of all at once. So natural text is run in several dtypes
and batch sizes, and a part of it token by token with a cache; each token with p > 0.5 in one
pass is checked in every pass. The text is the prose that comes along, and what `write` retains.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_trl import ROOT, git_state, machine

from memlaw.data.texts import natural_prose, retained_text
from memlaw.model.base import load_model
from memlaw.model.body import cache_in, cache_name

RESULTS = ROOT / "results" / "threshold.json"
BATCH_SIZES = {
    "float32": (8, 64),  # which differ by 0.000005 of p
    "bfloat16": (1, 2, 4, 8, 16, 32, 64),
    "float16": (1, 8, 64),
}
WINDOW, N_WINDOWS = 64, 1024
FEWER = {"float16": 160}  # windows, in a dtype that most CPUs are slow in
DECODED = 16  # windows that are run token by token, too
Passes = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, batch_size: int) -> tuple[Any, Any]:
    """p of each next token and whether it is the argmax, [windows, tokens − 1]."""
    p, correct = [], []
    for rows in ids.split(batch_size):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        found = looked_at(logits, rows[:, 1:])
        p.append(found[0])
        correct.append(found[1])
    return torch.cat(p).cpu().numpy(), torch.cat(correct).cpu().numpy()


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor) -> tuple[Any, Any]:
    """The same, one token at a time with a key-value cache, as decoding runs."""
    p, correct = [], []
    for window in ids:
        cache = None
        for position in range(len(window) - 1):
            out = model(
                input_ids=window[None, position : position + 1],
                **{cache_name(model): cache},
                use_cache=True,
            )
            cache = cache_in(out)
            found = looked_at(out.logits.float(), window[None, position + 1 : position + 2])
            p.append(found[0])
            correct.append(found[1])
    shape = (len(ids), ids.shape[1] - 1)
    return torch.cat(p).view(shape).cpu().numpy(), torch.cat(correct).view(shape).cpu().numpy()


def looked_at(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p of the targets in float64, and whether greedy decoding takes them."""
    p = torch.stack([row.double().log_softmax(-1) for row in logits])
    chosen = logits.argmax(-1)  # the first of equals, as `generate` takes
    return p.gather(-1, targets[..., None])[..., 0].exp(), chosen == targets


def run(results: Path) -> None:
    """All passes, and what they say of each other."""
    results.parent.mkdir(parents=True, exist_ok=True)
    passes: Passes = {}
    for dtype, sizes in BATCH_SIZES.items():
        base = load_model(dtype=dtype)
        text = "\n\n".join((natural_prose(), retained_text()))
        tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(tokens[: WINDOW * N_WINDOWS], device=base.model.device)
        ids = ids.view(N_WINDOWS, WINDOW)
        for size in sizes:
            some = ids[: FEWER.get(dtype, N_WINDOWS)]
            passes[f"{dtype}, {size} at a time"] = _filled(*measure(base.model, some, size))
            print(dtype, size, flush=True)
        passes[f"{dtype}, token by token"] = _filled(*decode(base.model, ids[:DECODED]))
        print(dtype, "token by token", flush=True)
    on = torch.cuda.get_device_name() if base.model.device.type == "cuda" else "CPU"
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(torch.get_num_threads()) | {"device": on},
        "n_tokens": N_WINDOWS * (WINDOW - 1),
        **verdict(passes),
    }
    results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _filled(p: Any, correct: Any) -> tuple[Any, Any]:
    """Of all windows: those that weren't run have a p of 0, which is never over the line."""
    rest = ((0, N_WINDOWS - len(p)), (0, 0))
    return np.pad(p, rest), np.pad(correct, rest)


def verdict(passes: Passes) -> dict[str, Any]:
    """Checks and counterexamples: within each pass, and of each pass in every other."""
    within = {"checks": 0, "counterexamples": 0}
    across: dict[str, dict[str, Any]] = {}
    for name, (p, _) in passes.items():
        over = p > 0.5
        for other, (p_other, correct) in passes.items():
            was_run = p_other > 0
            looked = over & was_run
            wrong = looked & ~correct
            if other == name:
                within["checks"] += int(looked.sum())
                within["counterexamples"] += int(wrong.sum())
                continue
            one, two = name.partition(",")[0], other.partition(",")[0]
            kind = one if one == two else f"{one} to {two}"
            of = across.setdefault(kind, {"checks": 0, "counterexamples": 0, "highest_p": 0.5})
            of["checks"] += int(looked.sum())
            of["counterexamples"] += int(wrong.sum())
            if wrong.any():
                of["highest_p"] = max(of["highest_p"], float(p[wrong].max()))
            both = looked & (p > 0)
            change = np.abs(p - p_other)[both]
            of["largest_change_of_p"] = max(of.get("largest_change_of_p", 0.0), float(change.max()))
    return {"within_a_pass": within, "across_passes": across}


def table(results: Path) -> None:
    """The result as Markdown."""
    found = json.loads(results.read_text(encoding="utf-8"))
    within, across = found["within_a_pass"], found["across_passes"]
    print("| p > 0.5 in | checked in | checks | not the argmax | at most at p | p moves by |")
    print("|---|---|---|---|---|---|")
    print(f"| a pass | the same | {within['checks']:,} | {within['counterexamples']:,} | – | – |")
    for kind, of in across.items():
        one, _, two = kind.partition(" to ")
        print(
            f"| {one} | {two or 'other batches'} | {of['checks']:,} | {of['counterexamples']:,} | "
            f"{of['highest_p']:.4f} | {of['largest_change_of_p']:.4f} |"
            if of["counterexamples"]
            else f"| {one} | {two or 'other batches'} | {of['checks']:,} | 0 | – | "
            f"{of['largest_change_of_p']:.4f} |"
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.command == "run":
        run(given.results)
    elif given.results.is_file():
        table(given.results)
    else:
        raise SystemExit(f"{given.results} isn't there. Make it: threshold.py run")


if __name__ == "__main__":
    main()
