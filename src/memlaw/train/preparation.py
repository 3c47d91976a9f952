"""From a model, sites and examples to what trains: engine, statistics, whiteners, learners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memlaw.core.errors import MemlawError
from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site
from memlaw.settings.choices import EngineChoice
from memlaw.settings.train import TrainConfig
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import Engine, EngineError, PlainEngine
from memlaw.train.learner import Learner
from memlaw.train.precondition import GeneralMoments, Whitener, record_inputs
from memlaw.train.retention import Term, separate_terms


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What learners of the same records have in common.

    Attributes:
        sites: where their adapters sit.
        config: how they are trained.
        terms: of the retention penalty; empty where nothing needs them.
        whiteners: one a site; empty without whitening.
    """

    sites: Sequence[Site]
    config: TrainConfig
    terms: Sequence[Term]
    whiteners: Sequence[Whitener]

    def learner(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        *,
        rank: int,
        rows: Sequence[int] | None = None,
        max_epochs: int | None = None,
        invocation_ids: Sequence[int] = (),
    ) -> Learner:
        """A new adapter on `model`, ready to be trained; see `Learner` and `Adapter`."""
        adapter = Adapter(
            self.sites,
            rank=rank,
            seed=self.config.seed,
            whiteners=self.whiteners,
            dropout=self.config.dropout,
            invocation_ids=invocation_ids,
        ).to(next(model.parameters()).device)
        return Learner(adapter, examples, self.config, self.terms, rows, max_epochs)


def prepare(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[Example],
    config: TrainConfig,
    general: Callable[[], Sequence[GeneralMoments]],
    engine: Engine | None = None,
) -> Preparation:
    """Measure what training by `config` needs to know of the records and of general text.

    Args:
        model: frozen, in eval mode, no adapter attached.
        sites: where adapters will sit.
        examples: the records to learn.
        config: how to train.
        general: gives general text's second moments, as `measure_general`; called if needed.
        engine: has the examples as its first ones, if it is there already.
    """
    moments = general() if config.whiten or config.retention else []
    whiteners: list[Whitener] = []
    if config.whiten:
        records = record_inputs(model, sites, examples, engine, range(len(examples)))
        whiteners = [
            Whitener(x, at_site, mixture=config.whiten_mixture, damping=config.whiten_damping)
            for x, (at_site, _) in zip(records, moments, strict=True)
        ]
    terms = separate_terms(moments) if config.retention else []
    return Preparation(sites=sites, config=config, terms=terms, whiteners=whiteners)


def make_engine(
    model: Any,
    sites: Sequence[Site],
    examples: Sequence[Example],
    *,
    held: Sequence[int] = (),
    n_alike: int | None = None,
    choice: EngineChoice = "auto",
    cache_mb: float,
    logits_mb: float,
    notice: Callable[[str], None],
) -> Engine:
    """What runs the model for learners.

    Args:
        model: frozen, in eval mode.
        sites: all that adapters will sit on.
        examples: what there is to learn, and what is held.
        held: rows of the held ones.
        n_alike: see `CachedEngine`.
        choice: `plain`; `cached`; or `auto`: cached where it can train the model, else plain.
        cache_mb, logits_mb: see `CachedEngine`.
        notice: is told where `auto` has to take the slower one.

    Raises:
        EngineError: `cached` was asked for and can't train this model.
    """
    if choice != "plain":
        try:
            return CachedEngine(
                model,
                sites,
                examples,
                held=held,
                n_alike=n_alike,
                cache_mb=cache_mb,
                logits_mb=logits_mb,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as found:  # whatever a model says to what it wasn't made for
            if isinstance(found, MemlawError) and not isinstance(found, EngineError):
                raise
            error = found if isinstance(found, EngineError) else _unfit(model, found)
            if choice == "cached":
                raise EngineError(f"{error} Use --engine plain.") from found
            notice(f"{error} Training on the plain engine, which is slower.")
    return PlainEngine(model, examples, sites=sites, held=held)


def _unfit(model: Any, error: Exception) -> EngineError:
    return EngineError(
        f"{type(model).__name__} can't be run from cached activations ({type(error).__name__})."
    )
