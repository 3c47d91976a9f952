"""What a CPU gains from multiplying 16-bit weights in float32: `memlaw.model.products`.

    python benchmarks/products.py [--dtype bfloat16] [--rounds 5]

The embedded model, as plain Transformers loads it in a dtype, with its linear layers widened, and
in float32, in turn: a forward pass over a batch, one with the way back to the tokens' embeddings,
and one over a single token of each of 1, 8 and 64 rows. Prints the medians in seconds, and how many
times as long plain layers take. On a CPU that multiplies the dtype by itself nothing is widened
otherwise; here it is, so that both are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from against_trl import git_state, machine
from torch import Tensor, nn

from memlaw.model.base import load_model
from memlaw.model.products import WideLinear, computes_in


def passes(model: Any, ids: Tensor) -> dict[str, float]:
    """Seconds of each kind of pass; ids [64, 32] int64."""
    found = {}

    def timed(name: str, rows: Tensor, *, back: bool = False) -> None:
        embeddings = model.get_input_embeddings()(rows).detach().requires_grad_(back)
        started = time.perf_counter()
        with torch.set_grad_enabled(back):
            logits = model(inputs_embeds=embeddings).logits
            if back:
                logits.float().logsumexp(-1).mean().backward()
        found[name] = time.perf_counter() - started

    timed("forward, 8 rows of 32 tokens", ids[:8])
    timed("and back", ids[:8], back=True)
    for n in (1, 8, 64):
        timed(f"one token of {n} row(s)", ids[:n, :1])
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(1000, 40_000, (64, 32))
    models = {}
    for name, dtype in (("plain", args.dtype), ("widened", args.dtype), ("float32", "float32")):
        models[name] = load_model(dtype=dtype, device="cpu").model
        for module in models[name].modules():
            if isinstance(module, nn.Linear) and name != "float32":
                module.__class__ = nn.Linear if name == "plain" else WideLinear
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            found = passes(model, ids)
            if number:  # the first one warms up
                rounds[name].append(found)
    for kind in rounds["plain"][0]:
        took = {name: statistics.median(r[kind] for r in found) for name, found in rounds.items()}
        ratios = [
            p[kind] / w[kind] for p, w in zip(rounds["plain"], rounds["widened"], strict=True)
        ]
        line = {"what": kind, **{f"{name}_s": s for name, s in took.items()}}
        line |= {"plain_over_widened": statistics.median(ratios), "lowest": min(ratios)}
        print(json.dumps({**line, "highest": max(ratios)}), flush=True)
    taken = str(computes_in(getattr(torch, args.dtype))).removeprefix("torch.")
    about = {"computed in": taken, "git": git_state(), "machine": machine(torch.get_num_threads())}
    print(json.dumps(about))


if __name__ == "__main__":
    main()
