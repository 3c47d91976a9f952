"""The memory probe: a grid of adapters over rank and length, and what each of them remembers.

The cells of a grid that share a length are trained side by side, in one `AdapterBank` and from one
activation cache; they come into the store together.

Source of the probe: arXiv 2605.30260.
"""

from __future__ import annotations

import functools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlaw.core.errors import ConfigError
from memlaw.core.files import json_sha256
from memlaw.core.intervals import mean_interval
from memlaw.core.observer import EpochStats, Observer, Spec
from memlaw.core.provenance import machine, versions
from memlaw.data.records import Example, Record, resolve_prompt_format
from memlaw.data.tasks import Task, parse_task, task_examples
from memlaw.data.texts import retained_text, sha256_of, unseen_text
from memlaw.law.store import Cell, CellStore, read_cells
from memlaw.measure.damage import windows
from memlaw.measure.recall import Audit, audit_examples
from memlaw.model.adapter import Adapter, resolve_sites
from memlaw.model.base import BaseModel, load_model
from memlaw.settings.choices import resolve_objective
from memlaw.settings.probe import DEFAULT_STEPS, ProbeConfig
from memlaw.settings.train import TrainConfig
from memlaw.train.cached import cached_or_plain
from memlaw.train.engine import Engine, Job
from memlaw.train.learner import DivergedError, Learner
from memlaw.train.precondition import Statistics, Whitener, measure_general, measure_statistics
from memlaw.train.trainer import AdapterBank

NUMERICS = 1  # raised when the same settings come to mean other results
_GROUP_TOKENS = 1600  # of a step, above which seeds are trained one after the other
_MOST_TOKENS = 16_384  # of a step, above which ranks are
_CURVE_POINTS = 100
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5)
_SATURATED = 0.05  # of the base model's loss
_STEPS, _LEARNING_RATE = 150, 5e-2
_CURRICULUM = (1 / 15, 2 / 15, 3 / 15, 4 / 15)  # of the epochs: the published 20, 40, 60, 80 of 300


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What `probe` found.

    Attributes:
        cells: a flat row for each cell of the grid, see `memlaw.cells.read_cells`. Of a success:

            n_records, n_tokens: what was to be remembered; n_tokens counts target tokens.
            n_parameters: trained numbers. bits_stored, bits_per_parameter: by how many bits fewer
            the targets take to tell.
            base_nll, nll, delta_nll: nats a target token, of the bare and the adapted model, and
            by how much it fell. saturated: nll is under a twentieth of base_nll.
            token_accuracy: share of target tokens that are the argmax. share_under: share with
            p < 0.55, teacher-forced. min_p, p_01, p_05, p_25, p_50: quantiles of p.
            recall: share of records recited. verbatim_prefix: mean share of a target before its
            first wrong token. certified: no token is under p 0.55, teacher-forced, and where greedy
            decoding was run (`decode`), it agrees.
            share_certified: share of records that pass likewise.
            n_steps: optimiser steps. train_flop: operations of the training, see `EpochStats`.
            relapses_per_token: how often a target token fell back under the line, looked at
            once an epoch. steps_to_certificate: after how many no token was seen under
            the line, looked at once an epoch, batch by batch, and at the end; None if never.
            damage_nll, damage_low, damage_high: rise of the loss on unseen text, in nats a token,
            with its 95 % interval.
        n_run: how many of them were run now.
        n_failed: how many of them failed.
        wall_s: seconds it took, loading included.
    """

    cells: list[dict[str, Any]]
    n_run: int
    n_failed: int
    wall_s: float


def probe(
    out: str | Path,
    config: ProbeConfig | None = None,
    *,
    launcher: Callable[..., Iterator[list[tuple[Spec, str, dict[str, Any]]]]] | None = None,
    observer: Observer | None = None,
) -> ProbeResult:
    """Train an adapter for each cell of a grid that has no result yet, and measure it.

    Args:
        out: the store; any number of grids may share one.
        config: what to probe.
        launcher: runs groups of cells: a function of (prober, config, groups, out), that yields
            for each group what became of its cells; default: `run_here`, one after the other.
            `memlaw.ray_launcher` has another.
        observer: is told of progress.

    Returns:
        The cells of the grid.

    Raises:
        MemlawError: a child that says what was wrong with settings, model, task or folder.
    """
    config = config or ProbeConfig()
    observer = observer or Observer()
    started = time.perf_counter()
    store = CellStore(out)
    store.recover()
    store.check_writable()
    prober = Prober(config, observer)
    keys = {prober.key(spec): spec for spec in prober.specs()}
    finished = store.finished(keys, observer.notice)
    there = read_cells(out, observer.notice, keys=finished) if finished else []
    observer.grid(config, there, len(keys))
    missing = [spec for key, spec in keys.items() if key not in finished]
    for group in (launcher or run_here)(prober, prober.groups(missing), Path(out)):
        for spec, status, result in group:
            observer.cell(spec, status, result)
    rows = read_cells(out, observer.notice, keys=keys)
    return ProbeResult(
        cells=rows,
        n_run=len(missing),
        n_failed=len(keys) - sum(row["status"] == "success" for row in rows),
        wall_s=time.perf_counter() - started,
    )


def run_here(
    prober: Prober, groups: Sequence[Sequence[Spec]], out: Path
) -> Iterator[list[tuple[Spec, str, dict[str, Any]]]]:
    """Run groups one after the other in this process."""
    store = CellStore(out)
    for group in groups:
        keys = [prober.key(spec) for spec in group]
        if len(store.finished(keys, lambda text: None)) < len(group):  # not by another, meanwhile
            yield run_group(prober, group, out)


def run_group(
    prober: Prober, group: Sequence[Spec], out: Path
) -> list[tuple[Spec, str, dict[str, Any]]]:
    """Train and measure the cells of a group, and put them into the store."""
    started = time.perf_counter()
    try:
        cells = prober.run(group)
    except ConfigError:  # no room for activations, say: the next group would fare alike
        raise
    except Exception:
        error = traceback.format_exc()
        return failed_cells(prober, group, out, error, wall_s=time.perf_counter() - started)
    CellStore(out).put(cells)
    return [
        (spec, cell.status, dict(cell.result or {"error": cell.error}))
        for spec, cell in zip(group, cells, strict=True)
    ]


def failed_cells(
    prober: Prober, group: Sequence[Spec], out: Path, error: str, *, wall_s: float
) -> list[tuple[Spec, str, dict[str, Any]]]:
    """Put into the store that a group came to nothing."""
    provenance = prober.provenance(group, wall_s)
    CellStore(out).put(
        [
            Cell(config=prober.identity(spec), status="failed", error=error, provenance=provenance)
            for spec in group
        ]
    )
    return [(spec, "failed", {"error": error}) for spec in group]


class Prober:
    """Runs cells of one grid in this process; loads and measures what they share.

    Args:
        config: what to probe.
        observer: is told of progress.
        base: the model, if it is loaded already.
    """

    def __init__(
        self,
        config: ProbeConfig,
        observer: Observer | None = None,
        base: BaseModel | None = None,
    ) -> None:
        self.config = config
        self.observer = observer or Observer()
        self.task: Task = parse_task(config.task)
        self.base: BaseModel = base or load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            notice=self.observer.notice,
        )
        self.format = resolve_prompt_format(self.base.tokenizer, config.prompt_format)
        self.sites = resolve_sites(self.base.model, config.placement_or_recipes, config.layers)
        limit = min(min(site.d_in, site.d_out) for site in self.sites)
        if max(config.ranks) > limit:
            raise ConfigError(
                f"rank {max(config.ranks)} is out of range: 1 to {limit} for this placement."
            )
        self.retained = retained_text(config.retain)
        self.unseen, _ = unseen_text(config.damage_text)
        if self.retained == self.unseen:
            raise ConfigError(
                "the text to retain is the text to measure damage on: it must be text that "
                "training doesn't see."
            )
        context = self.base.context_length
        self.unseen_windows = windows(self.base.tokenizer, self.unseen, context=context)
        self.retained_windows = windows(
            self.base.tokenizer, self.retained, context=context, name="the text to retain"
        )
        self.examples = functools.cache(self._examples)
        self.setting = functools.cache(self._setting)
        self.identity = functools.cache(self._identity)
        self.moments = functools.cache(self._moments)
        self.unseen_engine = functools.cache(self._unseen_engine)

    # ------------------------------------------------------------ what there is to run

    def specs(self) -> list[Spec]:
        """The cells of the grid."""
        config = self.config
        return [
            Spec(length, rank, seed)
            for length in dict.fromkeys(config.lengths)
            for seed in dict.fromkeys(config.seeds)
            for rank in dict.fromkeys(config.ranks)
        ]

    def groups(self, specs: Sequence[Spec]) -> list[list[Spec]]:
        """Cells to be trained together: of one length, and of several seeds where it is short."""
        by_data: dict[tuple[int, int], list[Spec]] = {}
        for spec in specs:
            by_data.setdefault((spec.length, spec.seed), []).append(spec)
        groups: list[list[Spec]] = []
        room, length_before = 0, None
        for (length, _), cells in by_data.items():
            at_once = max(1, _MOST_TOKENS // length)
            for start in range(0, len(cells), at_once):
                part = cells[start : start + at_once]
                n_tokens = length * len(part)
                if n_tokens > room or length != length_before:
                    groups.append([])
                    room = _GROUP_TOKENS
                groups[-1] += part
                room, length_before = room - n_tokens, length
        return groups

    def key(self, spec: Spec) -> str:
        """A cell's name in the store."""
        return json_sha256(self.identity(spec))

    def _setting(self) -> dict[str, Any]:
        """What all cells of the grid have in common."""
        config = self.config
        setting = {
            "numerics": NUMERICS,
            "task": self.task.name,
            "recipe": config.recipe,
            "steps": config.steps or (DEFAULT_STEPS if config.recipe == "default" else None),
            "objective": resolve_objective(config.objective),
            "asked": config.asked,
            "placement": config.placement_or_recipes,
            "layers": sorted({site.layer for site in self.sites}),
            "sites": [site.module for site in self.sites],
            "prompt_format": self.format,
            "decode": config.decode,
            "base_sha256": self.base.sha256,
            "tokenizer_sha256": self.base.tokenizer_sha256,
            "dtype": self.base.dtype,
            "device": self.base.model.device.type,
            "retained_sha256": sha256_of(self.retained),
            "unseen_sha256": sha256_of(self.unseen),
        }
        return {"setting": json_sha256(setting), **setting}

    def _identity(self, spec: Spec) -> dict[str, Any]:
        """All that decides a cell's result, but for rounding."""
        examples = self.examples(spec.length, spec.seed)
        training = self._training(spec.length, spec.seed)
        return json.loads(
            json.dumps(
                {
                    **self.setting(),
                    "length": spec.length,
                    "rank": spec.rank,
                    "seed": spec.seed,
                    "data_sha256": json_sha256([[e.prompt_ids, e.target_ids] for e in examples]),
                    "training": asdict(training),
                }
            )
        )

    def _training(self, length: int, seed: int) -> TrainConfig:
        examples = self.examples(length, seed)
        return self.config.training(seed, len(examples), sum(len(e.target_ids) for e in examples))

    def _examples(self, length: int, seed: int) -> tuple[Example, ...]:
        return tuple(
            task_examples(
                self.task,
                self.base.tokenizer,
                length,
                seed,
                format=self.format,
                natural_text=self.config.natural_text,
                max_tokens=self.base.context_length,
            )
        )

    def _moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return measure_general(self.base.model, self.sites, self.retained_windows, seed=0)

    # ------------------------------------------------------------ running a group

    def run(self, group: Sequence[Spec]) -> list[Cell]:
        """Train the cells side by side, and measure each."""
        started = time.perf_counter()
        examples: list[Example] = []
        rows: dict[tuple[int, int], list[int]] = {}
        for spec in group:
            own = spec.length, spec.seed
            if own not in rows:
                found = self.examples(*own)
                rows[own] = list(range(len(examples), len(examples) + len(found)))
                examples += found
        learners = self._learners(group, examples, rows)
        curves, errors, certified_at = self._train(group, self._engine(examples), learners)
        trained_s = time.perf_counter() - started
        base = {
            own: self._audit([examples[row] for row in of_seed], None)
            for own, of_seed in rows.items()
        }
        measured: list[tuple[dict[str, Any], Audit] | None] = []
        for spec, learner in zip(group, learners, strict=True):
            if spec in errors:
                measured.append(None)
                continue
            adapter = learner.adapter.folded()
            before = base[spec.length, spec.seed]
            audit = self._audit(before.examples, adapter)
            result = _measures(before, audit, adapter.n_parameters, learner.n_steps)
            result["train_flop"] = sum(stats.flop for stats in curves[spec])
            relapses = sum(stats.n_relapses for stats in curves[spec])
            result["relapses_per_token"] = relapses / result["n_tokens"]
            result["steps_to_certificate"] = certified_at.get(
                spec, learner.n_steps if audit.passed else None
            )
            result |= self._damage(adapter)
            if wrong := [n for n, v in result.items() if v is not None and not math.isfinite(v)]:
                errors[spec] = f"not finite after the last step: {', '.join(wrong)}"
                measured.append(None)
                continue
            measured.append((result, audit))
        provenance = self.provenance(group, time.perf_counter() - started) | {
            "train_s": trained_s / len(group)
        }
        return [
            Cell(
                config=self.identity(spec),
                status="success",
                result=found[0],
                curve=_thinned(curves[spec]),
                provenance=provenance,
                write_tokens=found[1].write_tokens,
            )
            if found is not None
            else Cell(
                config=self.identity(spec),
                status="failed",
                error=errors[spec],
                curve=_thinned(curves[spec]),
                provenance=provenance,
            )
            for spec, found in zip(group, measured, strict=True)
        ]

    def _learners(
        self,
        group: Sequence[Spec],
        examples: Sequence[Example],
        rows: dict[tuple[int, int], list[int]],
    ) -> list[Learner]:
        @functools.cache
        def prepared(own: tuple[int, int]) -> tuple[TrainConfig, list[Statistics], list[Whitener]]:
            config = self._training(*own)
            if not (config.whiten or config.retention):
                return config, [], []
            statistics = measure_statistics(
                self.base.model, self.sites, [examples[row] for row in rows[own]], self.moments()
            )
            whiteners = [
                Whitener(s, mixture=config.whiten_mixture, damping=config.whiten_damping)
                for s in statistics
                if config.whiten
            ]
            return config, statistics, whiteners

        learners = []
        for spec in group:
            own = spec.length, spec.seed
            config, statistics, whiteners = prepared(own)
            adapter = Adapter(
                self.sites,
                rank=spec.rank,
                seed=spec.seed,
                whiteners=whiteners,
                dropout=config.dropout,
            ).to(self.base.model.device)
            learners.append(Learner(adapter, examples, config, statistics, rows[own]))
        return learners

    def _engine(self, examples: Sequence[Example]) -> Engine:
        return cached_or_plain(
            self.base.model,
            self.sites,
            examples,
            cache_mb=self.config.cache_mb,
            logits_mb=self.config.logits_mb,
            notice=self.observer.notice,
        )

    def _train(
        self, group: Sequence[Spec], engine: Engine, learners: Sequence[Learner]
    ) -> tuple[dict[Spec, list[EpochStats]], dict[Spec, str], dict[Spec, int]]:
        """Curves; errors of those that diverged; when each was first seen without a token under."""
        curves: dict[Spec, list[EpochStats]] = {spec: [] for spec in group}
        errors: dict[Spec, str] = {}
        certified_at: dict[Spec, int] = {}
        running = dict(zip(group, learners, strict=True))
        bank = AdapterBank(engine, learners)
        while running:
            for spec, stats in zip(list(running), bank.run_epoch(), strict=True):
                learner = running[spec]
                if isinstance(stats, DivergedError):
                    errors[spec] = str(stats)
                else:
                    curves[spec].append(stats)
                    if stats.n_under == 0:  # as they were before the epoch's steps
                        earlier = curves[spec][-2:-1]
                        certified_at.setdefault(spec, earlier[0].n_steps if earlier else 0)
                if spec in errors or learner.progress >= 1:
                    bank.leave(learner)
                    del running[spec]
            last = [curve[-1] for curve in curves.values() if curve]
            if last:
                mean = sum(stats.nll_nats for stats in last) / len(last)
                least = min(learners, key=lambda learner: learner.progress)
                total = least.config.total_steps or 0
                self.observer.steps(group, min(least.n_looks, total), total, mean)
        return curves, errors, certified_at

    def _audit(self, examples: Sequence[Example], adapter: Adapter | None) -> Audit:
        def measure() -> Audit:
            return audit_examples(
                self.base.model,
                self.base.tokenizer,
                examples,
                decode="all" if self.config.decode and adapter is not None else "none",
            )

        if adapter is None:
            return measure()
        with adapter.attached(self.base.model):
            return measure()

    # ------------------------------------------------------------ damage

    def _unseen_engine(self) -> tuple[Engine, torch.Tensor]:
        """What runs unseen text, and the bare model's loss on each window [W]."""
        examples = [
            Example(
                record=Record(prompt="unseen", completion="text", id=f"window {n}"),
                prompt_ids=(row[0],),
                target_ids=tuple(row[1:]),
            )
            for n, row in enumerate(self.unseen_windows.tolist())
        ]
        engine = self._engine(examples)
        bare = Adapter(self.sites, rank=1, seed=0).to(self.base.model.device)  # B is zero
        return engine, _window_nll(engine, bare)

    def _damage(self, adapter: Adapter) -> dict[str, float]:
        engine, before = self.unseen_engine()
        delta = (_window_nll(engine, adapter) - before).tolist()
        low, high = mean_interval(delta)
        return {
            "damage_nll": sum(delta) / len(delta),
            "damage_low": low,
            "damage_high": high,
        }

    def provenance(self, group: Sequence[Spec], wall_s: float) -> dict[str, Any]:
        """Where and how long a group was run."""
        return {
            "wall_s": wall_s / len(group),
            "trained_together": [list(spec) for spec in group],
            "model": self.base.spec,
            "texts": {
                name: getattr(self.config, name)
                for name in ("natural_text", "retain", "damage_text")
            },
            "versions": versions(),
            "machine": machine(),
        }


@torch.no_grad()
def _window_nll(engine: Engine, adapter: Adapter) -> torch.Tensor:
    """[W] float64 nats a token: mean loss of each of the engine's examples."""
    lengths = [len(example.target_ids) for example in engine.examples]
    losses = engine.forward([Job(adapter, list(range(len(lengths))), dense=False)]).nll
    return torch.stack([part.double().mean() for part in losses.split(lengths)]).cpu()


def _measures(before: Audit, audit: Audit, n_parameters: int, n_steps: int) -> dict[str, Any]:
    """What one cell remembers."""
    tokens = audit.tokens
    bits = before.total_nll_bits - audit.total_nll_bits
    prefixes = [
        1.0 if record.first_failure is None else record.first_failure / record.n_tokens
        for record in audit.records
    ]
    p = np.quantile(tokens.p.astype(np.float64), _QUANTILES).tolist()
    needed = audit.threshold + audit.margin
    return {
        "n_records": len(audit.records),
        "n_tokens": len(tokens.p),
        "n_parameters": n_parameters,
        "base_nll": before.nll_nats,
        "nll": audit.nll_nats,
        "delta_nll": before.nll_nats - audit.nll_nats,
        "saturated": audit.nll_nats < _SATURATED * before.nll_nats,
        "token_accuracy": float(tokens.correct.mean()),
        "share_under": float((tokens.p < needed).mean()),
        "min_p": p[0],
        "p_01": p[1],
        "p_05": p[2],
        "p_25": p[3],
        "p_50": p[4],
        "recall": audit.n_recalled / len(audit.records),
        "verbatim_prefix": sum(prefixes) / len(prefixes),
        "share_certified": sum(r.passed for r in audit.records) / len(audit.records),
        "certified": audit.passed,
        "n_steps": n_steps,
        "bits_stored": bits,
        "bits_per_parameter": bits / n_parameters,
    }


def _thinned(curve: Sequence[EpochStats]) -> list[dict[str, Any]]:
    """At most a hundred epochs of a curve, the last one among them."""
    step = max(1, math.ceil(len(curve) / _CURVE_POINTS))
    kept = [stats for i, stats in enumerate(curve) if (len(curve) - 1 - i) % step == 0]
    names = ("epoch", "n_steps", "nll_nats", "n_under", "n_records_over", "n_relapses", "flop")
    return [{name: getattr(stats, name) for name in names} for stats in kept]
