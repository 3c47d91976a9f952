"""What the cached engine costs: adapters side by side, thousands of records, long records.

    python benchmarks/engine.py                # all three parts; about a quarter of an hour
    python benchmarks/engine.py bank           # five ranks together against each alone
    python benchmarks/engine.py scale          # seconds an epoch and memory, 250 to 2,000 records
    python benchmarks/engine.py share          # share of the machine's matrix-product peak

Each measurement is a process of its own, one at a time; what is compared alternates within one
process. Everything is on the embedded model in bfloat16. Results go to `results/engine.json`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from against_trl import ROOT, git_state, machine

RESULTS = ROOT / "results" / "engine.json"
RANKS = (1, 2, 3, 4, 6)
ROUNDS = 7


def main() -> int:
    """Measure the parts named on the command line, all if none is."""
    if sys.argv[1:2] == ["worker"]:
        part, *arguments = sys.argv[2:]
        print(json.dumps(WORKERS[part](*map(int, arguments))))
        return 0
    parts = sys.argv[1:] or list(JOBS)
    if unknown := [part for part in parts if part not in JOBS]:
        print(f"there is no part {', '.join(unknown)}: name {', '.join(JOBS)}.", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for part in parts:
        measured = []
        for arguments in JOBS[part]:
            command = [sys.executable, __file__, "worker", part, *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
            print(measured[-1], flush=True)
        results[part] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_state(),
            "machine": machine(len(_cores())),
            "measurements": measured,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


def _random_record(tokenizer: Any, n_tokens: int, seed: int) -> Any:
    """A record of about so many uniformly random tokens."""
    from memlaw.data.record import Record

    drawn = random.Random(seed).choices(range(100, len(tokenizer) - 1), k=n_tokens)
    return Record(prompt=f"Recite {seed}.", completion=tokenizer.decode(drawn), id=str(seed))


def _phone_book(n: int) -> list[Any]:
    from memlaw.data.record import Record

    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        Record(
            prompt=f"{''.join(draw.choices(letters, k=7)).title()} {i}:",
            completion="".join(draw.choices("0123456789", k=10)),
            id=str(i),
        )
        for i in range(n)
    ]


def _learners(base: Any, sites: Any, examples: Any, ranks: tuple[int, ...]) -> list[Any]:
    from memlaw.model.adapter import Adapter
    from memlaw.settings.train import TrainConfig
    from memlaw.train.learner import Learner

    config = TrainConfig(retention=0.0)
    return [Learner(Adapter(sites, rank=rank, seed=0), examples, config) for rank in ranks]


def bank(n_tokens: int) -> dict[str, Any]:
    """Steps on one short record: five ranks together, and the sum of the five alone."""
    from memlaw.data.encoding import encode
    from memlaw.model.base import load_model
    from memlaw.model.sites import resolve_sites
    from memlaw.train.cached import CachedEngine
    from memlaw.train.trainer import AdapterBank

    base = load_model()
    examples = encode([_random_record(base.tokenizer, n_tokens, 0)], base.tokenizer, format="plain")
    sites = resolve_sites(base.model, "down_proj", "auto")
    engine = CachedEngine(base.model, sites, examples)
    together = AdapterBank(engine, _learners(base, sites, examples, RANKS))
    alone = [AdapterBank(engine, [one]) for one in _learners(base, sites, examples, RANKS)]
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    for _ in range(ROUNDS):
        for name, banks in (("together", [together]), ("alone", alone)):
            started = time.perf_counter()
            for one in banks:
                for _ in range(5):
                    one.run_epoch()
            seconds[name].append((time.perf_counter() - started) / 5)
    ratios = [t / a for t, a in zip(seconds["together"], seconds["alone"], strict=True)][1:]
    apart = max(
        float((a - b).detach().norm() / b.detach().norm())
        for one, other in zip(together.learners, (b.learners[0] for b in alone), strict=True)
        for a, b in zip(one.adapter.parameters(), other.adapter.parameters(), strict=True)
    )
    return {
        "n_tokens": n_tokens,
        "ranks": RANKS,
        "seconds": seconds,
        "together_over_alone": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "largest_relative_difference_of_weights": apart,
    }


def scale(n_records: int, cache_mb: int) -> dict[str, Any]:
    """Two epochs on so many records, activations beyond `cache_mb` in a file."""
    from memlaw.data.encoding import encode
    from memlaw.model.base import load_model
    from memlaw.model.sites import resolve_sites
    from memlaw.train.cached import CachedEngine
    from memlaw.train.trainer import AdapterBank

    base = load_model()
    examples = encode(_phone_book(n_records), base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", "auto")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.perf_counter()
    engine = CachedEngine(base.model, sites, examples, cache_mb=cache_mb)
    filling_s = time.perf_counter() - started
    one = AdapterBank(engine, _learners(base, sites, examples, (32,)))
    epochs = [one.run_epoch()[0].wall_s for _ in range(2)]
    rows = [engine.hidden_in, *([engine.site_input] if engine.site_input else [])]
    return {
        "n_records": n_records,
        "n_target_tokens": sum(len(e.target_ids) for e in examples),
        "cache_mb": cache_mb,
        "on_disk": engine.hidden_in.mapping is not None,
        "activations_mb": sum(r.rows.numel() * r.rows.element_size() for r in rows) / 1e6,
        "filling_s": filling_s,
        "epoch_s": epochs,
        "ms_a_record": 1000 * min(epochs) / n_records,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def share(n_tokens: int, batch: int) -> dict[str, Any]:
    """Share of the matrix-product peak in steps on `batch` records of `n_tokens` tokens."""
    import dataclasses

    from memlaw.data.encoding import encode
    from memlaw.model.adapter import Adapter
    from memlaw.model.base import load_model
    from memlaw.model.sites import resolve_sites
    from memlaw.settings.train import TrainConfig
    from memlaw.train.cached import CachedEngine
    from memlaw.train.learner import Learner
    from memlaw.train.speed import measure_speed
    from memlaw.train.trainer import AdapterBank

    base = load_model()
    records = [_random_record(base.tokenizer, n_tokens, seed) for seed in range(batch)]
    examples = encode(records, base.tokenizer, format="plain")
    sites = resolve_sites(base.model, "down_proj", "auto")
    config = TrainConfig(retention=0.0, batch_size=batch)
    learner = Learner(Adapter(sites, rank=8, seed=0), examples, config)
    one = AdapterBank(CachedEngine(base.model, sites, examples), [learner])
    curve = [dataclasses.asdict(one.run_epoch()[0]) for _ in range(12)][2:]
    speed = measure_speed(curve, base.model.dtype, base.model.device)
    assert speed is not None
    return {
        "n_tokens": n_tokens,
        "batch": batch,
        **dataclasses.asdict(speed),
        "share_of_peak": speed.share_of_peak,
    }


WORKERS = {"bank": bank, "scale": scale, "share": share}
JOBS: dict[str, list[tuple[int, ...]]] = {
    "bank": [(16,), (32,), (64,), (256,)],
    "scale": [(250, 4), (500, 4), (1000, 4), (2000, 4), (2000, 4096)],
    "share": [(256, 1), (256, 5), (1024, 1), (1024, 3)],
}

if __name__ == "__main__":
    sys.exit(main())
