"""Training and measuring the cells of a grid, in this process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from memlaw.core.observer import EpochStats, Observer, Spec
from memlaw.data.record import Example
from memlaw.law.store import Cell
from memlaw.measure.damage import windows
from memlaw.measure.examine import Audit, audit_examples
from memlaw.model.adapter import Adapter
from memlaw.model.base import BaseModel
from memlaw.model.provenance import machine, versions
from memlaw.probe.cell_measures import UnseenDamage, measures, thinned, window_examples
from memlaw.probe.grid import Grid
from memlaw.settings.probe import ProbeConfig
from memlaw.train.engine import Engine
from memlaw.train.learner import DivergedError, Learner
from memlaw.train.precondition import GeneralMoments, measure_general
from memlaw.train.preparation import Preparation, make_engine, prepare
from memlaw.train.trainer import AdapterBank


class Prober(Grid):
    """Runs cells of one grid; loads and measures what they share.

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
        super().__init__(config, observer, base)
        self.unseen_windows = self._windows(self.texts.unseen, "the text to measure damage on")
        self.retained_windows = self._windows(self.texts.retained, "the text to retain")
        self.moments = functools.cache(self._moments)
        self.unseen_damage = functools.cache(self._unseen_damage)

    def _windows(self, text: str, name: str) -> torch.Tensor:
        context = self.base.context_length
        return windows(self.base.tokenizer, text, context=context, name=name)

    def _moments(self) -> list[GeneralMoments]:
        return measure_general(self.base.model, self.sites, self.retained_windows, seed=0)

    def _unseen_damage(self) -> UnseenDamage:
        bare = Adapter(self.sites, rank=1, seed=0).to(self.base.model.device)  # B is zero
        return UnseenDamage(self._engine(window_examples(self.unseen_windows)), bare)

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
            result = measures(before, audit, adapter.n_parameters, learner.n_steps)
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
                curve=thinned(curves[spec]),
                provenance=provenance,
                write_tokens=found[1].write_tokens,
            )
            if found is not None
            else Cell(
                config=self.identity(spec),
                status="failed",
                error=errors[spec],
                curve=thinned(curves[spec]),
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
        def prepared(own: tuple[int, int]) -> Preparation:
            records = [examples[row] for row in rows[own]]
            model, sites = self.base.model, self.sites
            return prepare(model, sites, records, self.training(*own), self.moments)

        return [
            prepared((spec.length, spec.seed)).learner(
                self.base.model, examples, rank=spec.rank, rows=rows[spec.length, spec.seed]
            )
            for spec in group
        ]

    def _engine(self, examples: Sequence[Example]) -> Engine:
        return make_engine(
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

    def _damage(self, adapter: Adapter) -> dict[str, float]:
        return self.unseen_damage().of(adapter)

    def provenance(self, group: Sequence[Spec], wall_s: float) -> dict[str, Any]:
        """Where and how long a group was run."""
        return {
            "wall_s": wall_s / len(group),
            "trained_together": [list(spec) for spec in group],
            "model": self.base.spec,
            "tokenizer": self.config.tokenizer,
            "texts": {
                name: getattr(self.config, name)
                for name in ("natural_text", "retain", "damage_text")
            },
            "versions": versions(),
            "machine": machine(),
        }
