"""How many certified bits a trained number can hold: the frontier, rank by rank.

    python benchmarks/frontier.py run NAME...   # of RUNS; each adds to results/frontier.json
    python benchmarks/frontier.py table         # the result as Markdown

Every run trains one adapter on random data until every token passes the line (p 0.55) or its steps
are over, then decodes every record greedily: certified is what passes both. Bits are what the data
were drawn with: log2 10 a digit, log2 of the vocabulary a token; ends of targets and how surprised
the base model was count for nothing. Nothing holds on to general text here: what that costs is
measured, too.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from against_trl import ROOT, git_state, machine

from memlaw.data.encoding import resolve_prompt_format, special_ids
from memlaw.data.tasks import parse_task, task_examples
from memlaw.data.texts import retained_text, unseen_text
from memlaw.measure.damage import measure_damage, windows
from memlaw.measure.examine import audit_examples
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.choices import Objective
from memlaw.settings.train import TrainConfig
from memlaw.train.cached import CachedEngine
from memlaw.train.learner import DivergedError
from memlaw.train.precondition import measure_general
from memlaw.train.preparation import prepare
from memlaw.train.trainer import AdapterBank

RESULTS = ROOT / "results" / "frontier.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one adapter is given.

    Attributes:
        task: phonebook or noise.
        n_tokens: target tokens, ends included.
        rank, placement, layer: of the adapter.
        epochs: at most; the rate falls to 0 over them.
        learning_rate: AdamW's.
        objective: which tokens the steps are spent on.
        batch_size: records a step.
        mixture: share of general text in the covariance that is whitened by.
        dtype: what the model computes in, in training and for the certificate.
        seed: of data, initialisation and order.
        start: the run whose adapter, left in the folder for temporary files, this one begins with.
    """

    task: str
    n_tokens: int
    rank: int
    placement: str = "mlp"
    layer: int = 17
    epochs: int = 400
    learning_rate: float = 0.1
    objective: Objective = "memft_threshold"
    batch_size: int = 10
    mixture: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    start: str | None = None


RUNS: dict[str, Run] = {
    "phonebook-r1-52": Run(task="phonebook", n_tokens=572, rank=1, epochs=300),
    "phonebook-r1-53": Run(
        task="phonebook",
        n_tokens=583,
        rank=1,
        epochs=70,
        learning_rate=0.03,
        start="phonebook-r1-52",
    ),
    "phonebook-r1-53-longer": Run(
        task="phonebook",
        n_tokens=583,
        rank=1,
        epochs=60,
        learning_rate=0.02,
        start="phonebook-r1-53",
    ),
    "phonebook-r1-52-bfloat16": Run(
        task="phonebook", n_tokens=572, rank=1, epochs=250, batch_size=5, dtype="bfloat16"
    ),
    **{
        f"noise-r{rank}-{n_tokens}": Run(
            task="noise",
            n_tokens=n_tokens,
            rank=rank,
            placement="down_proj",
            layer=20,
            epochs=400,
            learning_rate=0.05,
            objective="memft_threshold",
            mixture=0.9,
            dtype="bfloat16",
        )
        for rank, n_tokens in ((1, 40), (2, 80), (4, 160), (8, 320), (16, 640), (32, 1280))
    },
}


def run(name: str) -> None:
    """Train, certify, and add to the results."""
    what = RUNS[name]
    torch.manual_seed(0)
    started = time.perf_counter()
    base = load_model(dtype=what.dtype)
    model, tokenizer = base.model, base.tokenizer
    examples = task_examples(
        parse_task(what.task),
        tokenizer,
        what.n_tokens,
        what.seed,
        format=resolve_prompt_format(tokenizer, "auto"),
    )
    sites = resolve_sites(model, what.placement, (what.layer,))
    context = base.context_length
    general = windows(tokenizer, retained_text(), context=context, name="the text to retain")
    n_batches = -(-len(examples) // what.batch_size)
    config = TrainConfig(
        objective=what.objective,
        learning_rate=what.learning_rate,
        schedule="linear",
        total_steps=what.epochs * n_batches,
        batch_size=what.batch_size,
        whiten_mixture=what.mixture,
        retention=0.0,
        seed=what.seed,
    )
    prepared = prepare(
        model, sites, examples, config, lambda: measure_general(model, sites, general, seed=0)
    )
    learner = prepared.learner(model, examples, rank=what.rank)
    adapter = learner.adapter
    if what.start:
        kept = torch.load(f"{tempfile.gettempdir()}/{what.start}.pt", weights_only=True)
        whitening = adapter.whiteners[0].apply(torch.eye(sites[0].d_in))
        with torch.no_grad():
            adapter.a[0].copy_(torch.linalg.solve(whitening, kept["a.0"]))
            adapter.b[0].copy_(kept["b.0"])
    bank = AdapterBank(CachedEngine(model, sites, examples), [learner])
    training = time.perf_counter()
    flop, curve = 0.0, []
    while learner.progress < 1:
        (stats,) = bank.run_epoch()
        if isinstance(stats, DivergedError):
            raise stats
        flop += stats.flop
        curve.append([stats.n_steps, round(stats.nll_nats, 4), stats.n_under, stats.n_relapses])
        if stats.epoch % 20 == 0 or stats.n_under == 0:
            print(name, stats.epoch, curve[-1], stats.n_records_over, flush=True)
            torch.save(adapter.folded().state_dict(), f"{tempfile.gettempdir()}/{name}.pt")
        if stats.n_under == 0:
            break
    torch.save(adapter.folded().state_dict(), f"{tempfile.gettempdir()}/{name}.pt")
    train_s = time.perf_counter() - training
    folded = adapter.folded()
    with folded.attached(model):
        audit = audit_examples(model, tokenizer, examples, decode="all")
    unseen, _ = unseen_text(None)
    damage = measure_damage(
        model,
        lambda: folded.attached(model),
        windows(tokenizer, unseen, context=context),
        text_name="unseen",
        text=unseen,
    )
    bits = [_bits(what, example, tokenizer) for example in examples]
    certified = [b for b, r in zip(bits, audit.records, strict=True) if r.certified]
    row = {
        "name": name,
        **asdict(what),
        "n_parameters": adapter.n_parameters,
        "n_records": len(examples),
        "n_certified": len(certified),
        "n_recited": audit.n_recalled,
        "n_disagreements": len(audit.disagreements),
        "bits_given": sum(bits),
        "bits_certified": sum(certified),
        "certified_bits_per_parameter": sum(certified) / adapter.n_parameters,
        "n_under": sum(r.n_under for r in audit.records),
        "nll": audit.nll_nats,
        "damage_nll": damage.delta_nll_nats,
        "damage_ci95": list(damage.delta_nll_ci95),
        "epochs_run": learner.epoch,
        "n_steps": learner.n_steps,
        "train_flop": flop,
        "train_s": train_s,
        "wall_s": time.perf_counter() - started,
        "curve": curve[:: max(1, len(curve) // 60)],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(torch.get_num_threads()),
    }
    rows = [r for r in _read() if r["name"] != name] + [row]
    text = ",\n".join(json.dumps(r) for r in sorted(rows, key=_order))
    RESULTS.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print({k: v for k, v in row.items() if k not in ("curve", "git", "machine")}, flush=True)


def _bits(what: Run, example: Any, tokenizer: Any) -> float:
    """What the target of a record was drawn with."""
    if what.task == "phonebook":
        return len(example.record.completion) * math.log2(10)
    return (len(example.target_ids) - 1) * math.log2(len(tokenizer) - len(special_ids(tokenizer)))


def _order(row: dict[str, Any]) -> Any:
    return row["dtype"], row["n_records"], row["n_certified"]


def _read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []


def table() -> None:
    """What the published runs came to."""
    print(
        "| run | numbers | records | recited | certified | certified bits a number | ΔNLL | "
        "steps | TFLOP | minutes |"
    )
    print("|---" * 10 + "|")
    for row in _read():
        print(
            f"| {row['name']} ({row['dtype']}) | {row['n_parameters']:,} | {row['n_records']} | "
            f"{row['n_recited']} | {row['n_certified']} | "
            f"{row['certified_bits_per_parameter']:.3f} | {row['damage_nll']:+.1f} | "
            f"{row['n_steps']:,} | {row['train_flop'] / 1e12:,.0f} | {row['train_s'] / 60:.0f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and sys.argv[2:] and set(sys.argv[2:]) <= set(RUNS):
        for name in sys.argv[2:]:
            run(name)
    elif sys.argv[1:] == ["table"]:
        table()
    else:
        print(__doc__, "RUNS: " + ", ".join(RUNS), sep="\n", file=sys.stderr)
        sys.exit(2)
