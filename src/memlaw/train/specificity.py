"""A training that leaves other answers as they were: what stands ready before its first step.

What a step's loss is made of is said in `settings/recipe.py`; how negatives are drawn and the mean
of the weights is kept, in `holding.py`; when it ends, in `writer/mean_goals.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.base import BaseModel
from memlaw.model.body import body_of
from memlaw.model.forward import collate, logits_of
from memlaw.model.sites import Site
from memlaw.settings.recipe import Recipe
from memlaw.settings.train import TrainConfig
from memlaw.train.domains import Domain, measure_domains
from memlaw.train.engine import Engine
from memlaw.train.held import probing
from memlaw.train.holding import Holding
from memlaw.train.learner import Learner
from memlaw.train.negatives import Negatives
from memlaw.train.precondition import Whitener, record_inputs
from memlaw.train.retention import Term

_MOST_RECORDS = 100  # that are asked what makes their answers likely
_AT_ONCE = 16


def held_learner(
    base: BaseModel,
    engine: Engine,
    sites: Sequence[Site],
    records: Sequence[Example],
    negatives: Negatives,
    domains: Sequence[Domain],
    config: TrainConfig,
    recipe: Recipe,
    *,
    rank: int,
    max_epochs: int,
) -> Learner:
    """A new adapter, ready to be trained beside negatives.

    Args:
        base: the bare model.
        engine: its examples are the records, then near misses, then conversations, then others.
        sites: where the adapter sits.
        records: to learn.
        negatives: held to the bare model.
        domains: of `measure_domains`; empty where neither retention nor whitening needs them.
        config: how to train.
        recipe: what negatives count.
        rank: of the adapter.
        max_epochs: when training ends.
    """
    device = base.model.device
    adapter = Adapter(
        sites,
        rank=rank,
        seed=config.seed,
        whiteners=_whiteners(base, sites, records, domains, config) if config.whiten else (),
        dropout=config.dropout,
    ).to(device)
    everywhere = range(len(sites))
    n_near, n = len(negatives.near), len(records)
    rows = range(n, n + len(negatives.examples))
    holding = Holding(
        recipe,
        near=rows[:n_near],
        chats=rows[n_near:],
        lengths=[len(engine.examples[row].target_ids) for row in rows],
        n_records=n,
        closed=_all_near(base, engine, sites, records, n_near).whitened(adapter)
        if n_near
        else None,
        seed=config.seed,
    )
    terms = [
        Term(sites=everywhere, reads=d.reads, writes=d.writes, weight=d.share).dropped_out(
            recipe.shrinkage, seed=recipe.seed + i
        )
        for i, d in enumerate(domains)
        if config.retention
    ]
    return Learner(adapter, records, config, terms, max_epochs=max_epochs, holding=holding)


def domains_of(
    base: BaseModel,
    sites: Sequence[Site],
    retained: Int64[Tensor, "W S"],
    negatives: Negatives,
    config: TrainConfig,
    recipe: Recipe,
) -> list[Domain]:
    """The domains of retention, if anything needs them."""
    if not (config.whiten or config.retention):
        return []
    chats = [negatives.chats, negatives.kept]
    return measure_domains(base, sites, retained, chats, recipe=recipe)


def _whiteners(
    base: BaseModel,
    sites: Sequence[Site],
    records: Sequence[Example],
    domains: Sequence[Domain],
    config: TrainConfig,
) -> list[Whitener]:
    """General text's part is the mean over the domains, each by its share."""
    return [
        Whitener(
            read,
            torch.cat([d.share**0.5 * d.reads[i] for d in domains]),
            mixture=config.whiten_mixture,
            damping=config.whiten_damping,
        )
        for i, read in enumerate(record_inputs(base.model, sites, records))
    ]


def _all_near(
    base: BaseModel, engine: Engine, sites: Sequence[Site], records: Sequence[Example], n_near: int
) -> Term:
    """What is added on near misses in the directions that make a record's answer begin."""
    reads = engine.base.reads[:n_near].float() / n_near**0.5
    writes = _beginnings(base.model, sites, records[:_MOST_RECORDS])
    return Term(
        sites=range(len(sites)),
        reads=list(reads.split([site.d_in for site in sites], dim=1)),
        writes=[g / len(g) ** 0.5 for g in writes],
    )


def _beginnings(
    model: nn.Module, sites: Sequence[Site], records: Sequence[Example]
) -> list[Tensor]:
    """The gradient of log P(any record's first token) at each site's output, [n, D_out].

    At the last position of the prompt of each of the n records.
    """
    first = sorted({record.target_ids[0] for record in records})
    modules = [site.module for site in sites]
    found: list[list[Tensor]] = [[] for _ in sites]
    body = body_of(model)
    for start in range(0, len(records), _AT_ONCE):
        asked = [replace(r, target_ids=r.target_ids[:1]) for r in records[start:][:_AT_ONCE]]
        batch = collate(asked, next(model.parameters()).device)
        with probing(model, modules, batch.keep) as (_, probes):
            states = body(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        logits = logits_of(model, states.last_hidden_state[batch.keep]).float()
        (logits[:, first].logsumexp(1) - logits.logsumexp(1)).sum().backward()
        for out, probe in zip(found, probes, strict=True):
            out.append(probe.grad)  # type: ignore[arg-type]
    return [torch.cat(parts) for parts in found]
