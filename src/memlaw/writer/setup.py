"""What stands ready before the first epoch of `write`: layers, rank, engine and learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from memlaw.core.files import json_sha256
from memlaw.data.activation import activated, invocation_of
from memlaw.data.record import Example, Prompt
from memlaw.law.builtin import plan_by_builtin
from memlaw.measure.decode import decoded_text
from memlaw.measure.harm import measured_on
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel
from memlaw.model.cache import Kept, kept
from memlaw.model.sites import Site, decoder_layers, layers_at
from memlaw.settings.choices import Layers
from memlaw.settings.recipe import RECIPE
from memlaw.settings.write import WriteConfig
from memlaw.train.engine import Engine, bare_losses
from memlaw.train.learner import Learner
from memlaw.train.negatives import make_negatives
from memlaw.train.precondition import GeneralMoments, measure_general
from memlaw.train.preparation import make_engine, prepare
from memlaw.train.specificity import domains_of, held_learner

_START_BITS_PER_PARAMETER = 0.05
_LEAST_THIN_RANK = 4  # of each of several sites: fewer dimensions than that train slowly


class Ready(NamedTuple):
    """What trains the records.

    Attributes:
        engine: has them as its first examples.
        learner: in the state before the first epoch.
        base_nll: [target tokens] float32: what the bare model loses on each, in nats.
    """

    engine: Engine
    learner: Learner
    base_nll: Tensor


def activate(
    examples: Sequence[Example],
    text: str,
    tokenizer: Any,
    format: Literal["chat", "plain"],
    notice: Callable[[str], None],
) -> tuple[list[Example], tuple[int, ...]]:
    """The examples with where the adapter becomes active; and the tokens that it does so from.

    Args:
        examples: of the records.
        text: what they are all to be activated by.
        tokenizer: theirs.
        format: of their prompts.
        notice: is told if the tokens are not the whole text.

    Raises:
        ConfigError: as for `invocation_of`.
    """
    ids = invocation_of(text, examples, tokenizer, format)
    if (found := decoded_text(tokenizer, ids)) != text:
        notice(
            f"The adapter is active from {found!r} on: the part of {text!r} that is the same "
            "tokens in every prompt."
        )
    return activated(examples, ids), ids


def chosen_layers(model: Any, config: WriteConfig) -> Layers:
    """The layers asked for; with specificity several thin adapters by default."""
    if not (config.holds and config.layers == "auto"):
        return config.layers
    return layers_at(len(decoder_layers(model)[1]), RECIPE.depths)


def first_rank(
    base_sha256: str,
    sites: Sequence[Site],
    base_nll: Tensor,
    config: WriteConfig,
    max_rank: int,
    notice: Callable[[str], None],
) -> int:
    """The rank asked for; else a power of two with room to spare, no less than a plan's.

    Room to spare, about a twentieth of a bit for each parameter, is what training is quick in.
    Where specificity has chosen several layers, they share the numbers that one would get.

    Args:
        base_sha256: hash of the base model.
        sites: where the adapter sits.
        base_nll: what the base model loses on each target token of the records, in nats.
        config: the settings.
        max_rank: the most that auto starts with.
        notice: is told of a rank that is small.
    """
    layers = sorted({site.layer for site in sites})
    shared = len(layers) if config.holds and config.layers == "auto" else 1
    of_one = [site for site in sites if shared == 1 or site.layer == layers[0]]
    plan = plan_by_builtin(
        base_sha256,
        [site.module for site in of_one],
        len(base_nll),
        float(base_nll.mean()),
    )
    if config.rank != "auto":
        if plan is not None and config.rank * shared < plan.rank:
            expected, low, high = (-(-r // shared) for r in (plan.rank, *plan.rank_interval))
            notice(
                f"Rank {config.rank} is small for this: {expected} is expected to hold it after "
                f"150 steps (95 %: {low} to {high}; memlaw plan). It may take long, or fail."
            )
        return _without_gate(config.rank, sites, config)
    width = sum(site.d_in + site.d_out for site in of_one)
    rank = 1
    n_bits = float(base_nll.sum()) / math.log(2)
    while rank * width * _START_BITS_PER_PARAMETER < n_bits:
        rank *= 2
    rank = min(max(rank, plan.rank if plan else 1), max_rank)
    if shared > 1:
        rank = min(max(rank, _LEAST_THIN_RANK * shared), max_rank * shared)
    return _without_gate(max(1, rank // shared), sites, config)


def _without_gate(rank: int, sites: Sequence[Site], config: WriteConfig) -> int:
    """What is left of a rank when the gate has its one."""
    gated = config.holds and len({site.layer for site in sites}) > 1
    return max(1, rank - 1) if gated else rank


def plain_training(
    subject: Subject,
    records: Sequence[Example],
    sites: Sequence[Site],
    retained: torch.Tensor,
    config: WriteConfig,
    *,
    invocation_ids: Sequence[int],
    rank: Callable[[Tensor], int],
    notice: Callable[[str], None],
    besides: Sequence[Example] = (),
) -> Ready:
    """What trains the records by themselves.

    Args:
        subject: the base model, and the records.
        records: the same as tokens.
        sites: where the adapter sits.
        retained: [W, S] int64: windows of the text to retain.
        config: the settings.
        invocation_ids: from which on the adapter is active; none at all: everywhere.
        rank: gives that of the adapter, from `Ready.base_nll`.
        notice: is told where the plain engine has to do.
        besides: of an update: the last of the engine's examples, held ones.
    """
    model = subject.base.model

    def general() -> list[GeneralMoments]:
        return general_moments(subject.base, sites, retained, seed=config.seed)

    examples = [*records, *besides]
    held = range(len(records), len(examples))
    engine = _engine(model, sites, examples, config, notice, held=held)
    base_nll = bare_losses(engine, sites, len(records), model.device)
    learner = prepare(model, sites, records, config, general, engine).learner(
        model,
        records,
        rank=rank(base_nll),
        max_epochs=config.max_epochs,
        invocation_ids=invocation_ids,
    )
    return Ready(engine, learner, base_nll)


def general_moments(
    base: BaseModel, sites: Sequence[Site], retained: torch.Tensor, *, seed: int
) -> list[GeneralMoments]:
    """What `measure_general` finds: of the base model alone, so that it is measured once."""

    def make() -> Kept:
        reads, writes = zip(*measure_general(base.model, sites, retained, seed=seed), strict=True)
        named = {f"reads.{i}": x for i, x in enumerate(reads)}
        return Kept(None, named | {f"writes.{i}": g for i, g in enumerate(writes)})

    settings = {
        "sites": [site.module for site in sites],
        "text": json_sha256(retained.tolist()),
        "seed": seed,
    }
    tensors, device = kept(base, "general-moments", settings, make).tensors, base.model.device
    return [
        (tensors[f"reads.{i}"].to(device), tensors[f"writes.{i}"].to(device))
        for i in range(len(sites))
    ]


def held_training(
    subject: Subject,
    records: Sequence[Example],
    sites: Sequence[Site],
    retained: torch.Tensor,
    config: WriteConfig,
    *,
    keep: Sequence[Prompt],
    rank: Callable[[Tensor], int],
    notice: Callable[[str], None],
    besides: Sequence[Example] = (),
) -> Ready:
    """What trains the records, and holds the model to its base elsewhere; see `plain_training`.

    Args:
        subject, records, sites, retained, config, rank, notice, besides: as there.
        keep: prompts whose answers are held.
    """
    notice(
        "Near misses and conversations go through the model once before training starts. The first "
        "time with a base model, what it says by itself is measured, too: minutes, kept for later."
    )
    base = subject.base
    negatives = make_negatives(
        subject, records, recipe=RECIPE, keep=keep, avoid=measured_on(subject)
    )
    domains = domains_of(base, sites, retained, negatives, config, RECIPE)
    n, n_near = len(records), len(negatives.near)
    examples = [*records, *negatives.examples, *besides]
    engine = _engine(
        base.model,
        sites,
        examples,
        config,
        notice,
        held=range(n, len(examples)),
        n_alike=n + n_near,
    )
    base_nll = bare_losses(engine, sites, n, base.model.device)
    learner = held_learner(
        base,
        engine,
        sites,
        records,
        negatives,
        domains,
        config,
        RECIPE,
        rank=rank(base_nll),
        max_epochs=config.max_epochs,
    )
    return Ready(engine, learner, base_nll)


def _engine(
    model: Any,
    sites: Sequence[Site],
    examples: Sequence[Example],
    config: WriteConfig,
    notice: Callable[[str], None],
    **held: Any,
) -> Engine:
    return make_engine(
        model,
        sites,
        examples,
        choice=config.engine,
        cache_mb=config.cache_mb,
        logits_mb=config.logits_mb,
        notice=notice,
        **held,
    )
