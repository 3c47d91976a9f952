"""What a run of `write` is: all that is trained, and how it is saved and restored."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memlaw.core.files import json_sha256
from memlaw.core.observer import EpochStats, Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.prompts import read_prompts
from memlaw.data.record import Record
from memlaw.data.rendering import parsed_arguments
from memlaw.data.settling import settle_rendering
from memlaw.data.texts import GeneralTexts, sha256_of
from memlaw.measure.damage import N_WINDOWS, windows
from memlaw.measure.harm import kinds_to_measure, measurements
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel
from memlaw.model.generation import generation_notice
from memlaw.model.sites import resolve_sites
from memlaw.model.vocabulary import require_rows, require_sayable
from memlaw.settings.recipe import RECIPE
from memlaw.settings.write import BEFORE, BOUNDS, FREE_TO_CHANGE, WriteConfig
from memlaw.train.snapshots import Snapshots
from memlaw.train.trainer import AdapterBank
from memlaw.writer.folder import checkpoint_clock, read_checkpoint, write_checkpoint
from memlaw.writer.forgetting import to_forget
from memlaw.writer.rehearsal import rehearse, require_causal
from memlaw.writer.setup import (
    activate,
    chosen_layers,
    first_rank,
    held_training,
    plain_training,
)

State = tuple[dict[str, torch.Tensor], dict[str, Any]]  # of a learner


class Run:
    """One run of `write`: records, model and learner, and what training saw so far.

    With `config.resume` it goes on from the checkpoint in its folder, if there is one.

    Args:
        records: what to write.
        bad: rows that can't be used so far; takes those that have no tokens, too.
        texts: to retain, and to measure damage on.
        base: what to write it into.
        config: how.
        out: the folder; nothing is written there yet.
        observer: is told of what is decided here.
        clock: the time that chat templates are told, ISO 8601; None: now.
        removed: of an update: records that the adapter is to forget.

    Attributes:
        settled: how their prompts are rendered.
        retained: windows of the text to retain, [W, S] int64.
        examples: the records as tokens.
        invocation_ids: the tokens from which on the adapter is active; empty: everywhere.
        base_nll: [target tokens] nats: what the bare model loses on each of theirs.
        learner: what is trained; `trainer` trains it.
        curve: what each epoch saw.
        snapshots: p of each target token, epoch by epoch.
        measurements: what measures harm, by kind.
        earlier: the lines of the folder's earlier generations, as `run.json` has them.
        changed: how many records are added, replaced, removed and unchanged in this one.
        forgotten: what was found of it, as `run.json` has it; None likewise.
        lost: what is to be forgotten; None: nothing is.
        anew: training starts from nothing, not from an earlier generation.
        stood: of an update: columns of the adapter that haven't been trained since all were.
        given_up_s: seconds that an update had spent on changing the earlier one, before that; those
            for what is kept of the base model aren't in it.
        trained_before_s: of a run that is resumed, seconds of training before that.
        audit_s, forgetting_s: seconds of the last audit, and of all looking for what was removed.
        ended: of a run that is resumed, why it had ended: it was killed while it was handed over.
        resumable: checkpoints are kept. An update has none: it begins anew from the old generation.

    Raises:
        MemlawError: a child that says what doesn't fit.
    """

    def __init__(
        self,
        *,
        records: Sequence[Record],
        bad: BadRows,
        texts: GeneralTexts,
        base: BaseModel,
        config: WriteConfig,
        out: Path,
        observer: Observer,
        clock: str | None = None,
        removed: Sequence[Record] = (),
    ) -> None:
        self.bad, self.texts, self.base, self.config = bad, texts, base, config
        self.out, self.observer = out, observer
        context, tokenizer = base.context_length, base.tokenizer
        self.prompt_format = resolve_prompt_format(tokenizer, config.prompt_format)
        self.settled = settle_rendering(
            records,
            tokenizer,
            format=self.prompt_format,
            arguments=parsed_arguments(config.template_args, tokenizer),
            clock=checkpoint_clock(out) if config.resume else clock,
            way=config.prompt_rendering,
            bad=bad,
            notice=observer.notice,
        )
        self.examples = encode(
            records, tokenizer, format=self.prompt_format, max_tokens=context, bad=bad
        )
        bad.settle(len(self.examples), skip=config.skip_bad, notice=observer.notice)
        require_rows(base.model, tokenizer, (e.prompt_ids + e.target_ids for e in self.examples))
        require_causal(base, self.examples)
        require_sayable(base.model, tokenizer, self.examples, config.threshold + config.margin)
        if said := generation_notice(base.model, tokenizer, self.examples[0].target_ids[-1]):
            observer.notice(said)
        self.retained = windows(
            tokenizer,
            texts.retained,
            context=context,
            n_windows=RECIPE.text_windows if config.holds else N_WINDOWS,
            name="the text to retain",
        )
        self.invocation_ids: tuple[int, ...] = ()
        if config.activated is not None:
            self.examples, self.invocation_ids = activate(
                self.examples, config.activated, tokenizer, self.prompt_format, observer.notice
            )
        self.sites = resolve_sites(base.model, config.placement, chosen_layers(base.model, config))
        rehearse(
            base,
            self.sites,
            self.examples,
            invocation_ids=self.invocation_ids,
            specificity=config.specificity,
        )
        self.subject = Subject(
            base=base,
            texts=texts,
            records=[example.record for example in self.examples],
            format=self.prompt_format,
            first_layer=min(site.layer for site in self.sites),
            near=config.near,
        )
        self.measurements = measurements(self.subject, kinds_to_measure(config.specificity))
        self.keep = read_prompts(config.keep) if config.keep else []
        self.max_rank = min(config.max_rank, *(min(s.d_in, s.d_out) for s in self.sites))
        checkpoint = None
        if config.resume:
            defaults = _jsonable(asdict(WriteConfig().resolved())) | BEFORE
            checkpoint = read_checkpoint(out, self._identity(), defaults)
        self.lost = to_forget(self.subject, removed, self.invocation_ids) if removed else None
        setup = (
            functools.partial(held_training, keep=self.keep)
            if config.holds
            else functools.partial(plain_training, invocation_ids=self.invocation_ids)
        )
        engine, self.learner, self.base_nll = setup(
            self.subject,
            self.examples,
            self.sites,
            self.retained,
            config,
            rank=self._first_rank,
            notice=observer.notice,
            besides=[] if self.lost is None else self.lost.examples,
        )
        self.trainer = AdapterBank(engine, [self.learner])
        self.curve: list[EpochStats] = []
        self.snapshots = Snapshots(len(self.learner.seen.p))
        self.forgotten: dict[str, Any] | None = None
        self.ended = ""
        self.resumable = self.anew = True
        self.stood = 0
        self.given_up_s = self.audit_s = self.forgetting_s = self.trained_before_s = 0.0
        self.earlier: list[dict[str, Any]] = []
        self.changed = {"added": len(self.examples), "replaced": 0, "removed": 0, "unchanged": 0}
        if checkpoint is not None:
            self._restore(*checkpoint)

    def _first_rank(self, base_nll: torch.Tensor) -> int:
        base, config = self.base, self.config
        return first_rank(
            base.sha256, self.sites, base_nll, config, self.max_rank, self.observer.notice
        )

    def bounds(self) -> dict[str, float]:
        """What is asked of each kind of harm that is bounded: the most that `high` may be."""
        asked = {
            name: getattr(self.config, measurement.bound)
            for name, measurement in self.measurements.items()
            if measurement.bound
        }
        return {
            name: self.measurements[name].limit(bound)
            for name, bound in asked.items()
            if bound is not None
        }

    @property
    def held(self) -> dict[str, Any]:
        """What an update has to know of how this was held, JSON-able; see `warm.start_warm`."""
        holding, keeping = self.learner.holding, self.learner.keeping
        return {
            "gate": holding.gate if holding else None,
            "push": holding.kept_push if holding else None,
            "still": self.stood if keeping and keeping.still else 0,
        }

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
        return (
            _jsonable(settings)
            | {
                "kind of checkpoint": 2,
                "records": json_sha256([e.record.sha256 for e in self.examples]),
                "base model": self.base.sha256,
                "tokenizer": self.base.tokenizer_sha256,
                "retained text": sha256_of(self.texts.retained),
            }
            | (self._held_identity if self.config.holds else {})
        )

    @functools.cached_property
    def _held_identity(self) -> dict[str, Any]:
        near = self.config.near
        content = {
            "recipe": asdict(RECIPE),
            "prompts to keep": {"keep": self.keep},
            "near misses": {"near": read_prompts(near) if near else []},
        }
        if held_out := [e.record.held_out for e in self.examples if e.record.held_out]:
            content["phrasings held out"] = {"held out": held_out}
        return {name: json_sha256(_jsonable(values)) for name, values in content.items()}

    def save(self, state: State, *, ended: str = "") -> None:
        """Write a checkpoint of a state of the learner, an epoch's end.

        Args:
            state: the state.
            ended: why training is over; empty: it isn't, or hasn't reached what was asked for.
        """
        if not self.resumable:
            return
        tensors, values = state
        curve = [asdict(stats) for stats in self.curve[: values["epoch"]]]  # it may be ahead
        # Counting operations takes other ways through the model: a resumed run mustn't count again.
        counted = [self.trainer.flop_there, self.trainer.flop_back]
        content = {
            "identity": self._identity(),
            "engine": values,
            "clock": self.settled.rendering.clock,
            "curve": curve,
            "flop a token": counted,
            "ended": ended,
            "asked": self._asked(),
        }
        seen = self.snapshots.until(values["epoch"]).arrays()
        tensors = tensors | {f"seen.{name}": torch.from_numpy(a) for name, a in seen.items()}
        write_checkpoint(self.out, tensors, content)

    def _asked(self) -> dict[str, Any]:
        """What training has to reach beyond the certificate; a resumed run may change it."""
        return _jsonable({name: getattr(self.config, name) for name in (*BOUNDS, "robust_to")})

    def _restore(self, tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        self.learner.restore(tensors, content["engine"])
        if "flop a token" in content:
            self.trainer.flop_there, self.trainer.flop_back = content["flop a token"]
        known = {f.name for f in dataclasses.fields(EpochStats)}
        self.curve = [
            EpochStats(**{k: v for k, v in epoch.items() if k in known})
            for epoch in content["curve"]
        ]
        self.trained_before_s = sum(stats.wall_s for stats in self.curve)
        if "seen.p" in tensors:
            self.snapshots = Snapshots.from_arrays(
                tensors["seen.epochs"].numpy(), tensors["seen.p"].numpy()
            )
        if content.get("asked") == self._asked():
            self.ended = str(content.get("ended", ""))
        self.observer.notice(f"Going on from epoch {self.learner.epoch}.")


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: lists for tuples."""
    return dict(json.loads(json.dumps(values)))
