"""What a run of `write` is: all that is trained, and how it is saved and restored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memlaw.core.files import json_sha256
from memlaw.core.observer import EpochStats, Observer
from memlaw.data.activation import activated, invocation_of
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.record import Record
from memlaw.data.texts import GeneralTexts, sha256_of
from memlaw.law.builtin import plan_by_builtin
from memlaw.measure.damage import windows
from memlaw.measure.decode import decoded_text
from memlaw.measure.examine import audit_examples
from memlaw.measure.harm import KINDS
from memlaw.model.base import BaseModel
from memlaw.model.sites import resolve_sites
from memlaw.settings.write import FREE_TO_CHANGE, WriteConfig
from memlaw.train.precondition import GeneralMoments, measure_general
from memlaw.train.preparation import make_engine, prepare
from memlaw.train.snapshots import Snapshots
from memlaw.train.trainer import AdapterBank
from memlaw.writer.folder import read_checkpoint, write_checkpoint

State = tuple[dict[str, torch.Tensor], dict[str, Any]]  # of a learner
_START_BITS_PER_PARAMETER = 0.05


class Run:
    """One run of `write`: records, model and learner, and what training saw so far.

    With `config.resume` it goes on from the checkpoint in its folder, if there is one.

    Args:
        records: what to write.
        texts: to retain, and to measure damage on.
        base: what to write it into.
        config: how.
        out: the folder; nothing is written there yet.
        observer: is told of what is decided here.

    Attributes:
        examples: the records as tokens.
        invocation_ids: the tokens from which on the adapter is active; empty: everywhere.
        base_audit: what the bare model makes of them, teacher-forced.
        learner: what is trained; `trainer` trains it.
        curve: what each epoch saw.
        snapshots: p of each target token, epoch by epoch.
        measurements: of each kind of harm, by name.

    Raises:
        MemlawError: a child that says what doesn't fit.
    """

    def __init__(
        self,
        *,
        records: Sequence[Record],
        texts: GeneralTexts,
        base: BaseModel,
        config: WriteConfig,
        out: Path,
        observer: Observer,
    ) -> None:
        self.texts, self.base, self.config = texts, base, config
        self.out, self.observer = out, observer
        context, tokenizer = base.context_length, base.tokenizer
        retained = windows(tokenizer, texts.retained, context=context, name="the text to retain")
        self.measurements = {name: kind.of_run(base, texts) for name, kind in KINDS.items()}
        self.prompt_format = resolve_prompt_format(tokenizer, config.prompt_format)
        self.examples = encode(records, tokenizer, format=self.prompt_format, max_tokens=context)
        self.invocation_ids: tuple[int, ...] = ()
        if config.activated is not None:
            self.invocation_ids = invocation_of(
                config.activated, self.examples, tokenizer, self.prompt_format
            )
            self.examples = activated(self.examples, self.invocation_ids)
            found = decoded_text(tokenizer, self.invocation_ids)
            if found != config.activated:
                observer.notice(
                    f"The adapter is active from {found!r} on: the part of {config.activated!r} "
                    "that is the same tokens in every prompt."
                )
        self.sites = resolve_sites(base.model, config.placement, config.layers)
        self.max_rank = min(config.max_rank, *(min(s.d_in, s.d_out) for s in self.sites))
        checkpoint = None
        if config.resume:
            checkpoint = read_checkpoint(out, self._identity(), _jsonable(asdict(WriteConfig())))
        self.base_audit = audit_examples(
            base.model,
            tokenizer,
            self.examples,
            threshold=config.threshold,
            margin=config.margin,
            batch_size=config.audit_batch_size,
            decode="none",
        )

        def general() -> list[GeneralMoments]:
            return measure_general(base.model, self.sites, retained, seed=config.seed)

        rank = self._first_rank()
        self.learner = prepare(base.model, self.sites, self.examples, config, general).learner(
            base.model,
            self.examples,
            rank=rank,
            max_epochs=config.max_epochs,
            invocation_ids=self.invocation_ids,
        )
        engine = make_engine(
            base.model,
            self.sites,
            self.examples,
            choice=config.engine,
            cache_mb=config.cache_mb,
            logits_mb=config.logits_mb,
            notice=observer.notice,
        )
        self.trainer = AdapterBank(engine, [self.learner])
        self.curve: list[EpochStats] = []
        self.snapshots = Snapshots(len(self.learner.seen.p))
        if checkpoint is not None:
            self._restore(*checkpoint)

    def _first_rank(self) -> int:
        """The rank asked for; else a power of two with room to spare, no less than a plan's.

        Room to spare, about a twentieth of a bit for each parameter, is what training is quick in.
        """
        plan = plan_by_builtin(
            self.base.sha256,
            [site.module for site in self.sites],
            len(self.base_audit.tokens.token_id),
            self.base_audit.nll_nats,
        )
        if self.config.rank != "auto":
            if plan is not None and self.config.rank < plan.rank:
                self.observer.notice(
                    f"Rank {self.config.rank} is small for this: {plan.rank} is expected to hold "
                    f"it after 150 steps (95 %: {plan.rank_interval[0]} to "
                    f"{plan.rank_interval[1]}; memlaw plan). It may take long, or fail."
                )
            return self.config.rank
        width = sum(s.d_in + s.d_out for s in self.sites)
        rank = 1
        while rank * width * _START_BITS_PER_PARAMETER < self.base_audit.total_nll_bits:
            rank *= 2
        return min(max(rank, plan.rank if plan else 1), self.max_rank)

    def bounds(self) -> dict[str, float]:
        """The bounds that were asked for, by kind of harm."""
        asked = {name: getattr(self.config, kind.bound) for name, kind in KINDS.items()}
        return {name: bound for name, bound in asked.items() if bound is not None}

    def note(self, stats: EpochStats) -> None:
        """Keep what an epoch saw, and tell of it."""
        self.curve.append(stats)
        self.snapshots.add(stats.epoch, self.learner.seen.p.numpy())
        self.observer.epoch(stats, len(self.examples), self.config.max_epochs)

    def go_back(self, state: State) -> None:
        """Go back to an earlier state of the learner."""
        self.learner.restore(*state)
        del self.curve[self.learner.epoch :]

    # ------------------------------------------------------------ the checkpoint

    def _identity(self) -> dict[str, Any]:
        """All that decides which weights come out, for `--resume` to compare."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in FREE_TO_CHANGE}
        return _jsonable(settings) | {
            "kind of checkpoint": 2,
            "records": json_sha256([e.record.sha256 for e in self.examples]),
            "base model": self.base.sha256,
            "tokenizer": self.base.tokenizer_sha256,
            "retained text": sha256_of(self.texts.retained),
        }

    def save(self, state: State) -> None:
        """Write a checkpoint of a state of the learner, an epoch's end."""
        tensors, values = state
        curve = [asdict(stats) for stats in self.curve[: values["epoch"]]]  # it may be ahead
        content = {"identity": self._identity(), "engine": values, "curve": curve}
        seen = self.snapshots.until(values["epoch"]).arrays()
        tensors = tensors | {f"seen.{name}": torch.from_numpy(a) for name, a in seen.items()}
        write_checkpoint(self.out, tensors, content)

    def _restore(self, tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        self.learner.restore(tensors, content["engine"])
        known = {f.name for f in dataclasses.fields(EpochStats)}
        self.curve = [
            EpochStats(**{k: v for k, v in epoch.items() if k in known})
            for epoch in content["curve"]
        ]
        if "seen.p" in tensors:
            self.snapshots = Snapshots.from_arrays(
                tensors["seen.epochs"].numpy(), tensors["seen.p"].numpy()
            )
        self.observer.notice(f"Going on from epoch {self.learner.epoch}.")


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: lists for tuples."""
    return dict(json.loads(json.dumps(values)))
