"""Write records into a model: train an adapter until the certificate holds, and hand both over."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from memlaw.certify.certificate import Certificate, make_certificate
from memlaw.core.errors import ConfigError
from memlaw.core.files import (
    CERTIFICATE_FILE,
    RUN_FILE,
    TOKENS_FILE,
    json_sha256,
    write_json,
    write_text,
)
from memlaw.core.observer import Observer
from memlaw.core.provenance import machine, versions
from memlaw.data.records import (
    Record,
    encode,
    read_records,
    resolve_prompt_format,
)
from memlaw.data.texts import retained_text, sha256_of, unseen_text
from memlaw.law.plan import plan_by_builtin
from memlaw.measure.damage import (
    Damage,
    measure_damage,
    windows,
)
from memlaw.measure.recall import Audit, audit_examples, decoded_text
from memlaw.model.adapter import (
    Adapter,
    adapter_sha256,
    loaded_adapter,
    resolve_sites,
    save_adapter,
)
from memlaw.model.base import BaseModel, load_model
from memlaw.settings.given import settled
from memlaw.settings.write import FREE_TO_CHANGE, WriteConfig
from memlaw.train.cached import CachedEngine, cached_or_plain
from memlaw.train.engine import Engine, EngineError, PlainEngine
from memlaw.train.learner import DivergedError, Learner
from memlaw.train.precondition import Statistics, Whitener, measure_general, measure_statistics
from memlaw.train.snapshots import SNAPSHOTS_FILE, Snapshots
from memlaw.train.speed import Speed, measure_speed
from memlaw.train.trainer import AdapterBank
from memlaw.writer.card import model_card
from memlaw.writer.folder import (
    CARD_FILE,
    CHECKPOINT_FILE,
    check_out,
    read_checkpoint,
    write_checkpoint,
)

_CHECKPOINT_EVERY_S = 5.0
_START_BITS_PER_PARAMETER = 0.05
_PATIENCE_EPOCHS = 40
_TIGHTER = 1.25  # retention's change, an epoch, once certified with more damage than allowed


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """What `write` made.

    Attributes:
        out: the folder.
        certificate: what was found.
        audit: the verdicts and the token table.
        damage: change on unseen text.
        max_damage: the bound that was asked for, in nats a token; None if none was.
        rank: the adapter's.
        n_parameters: trained numbers.
        bits_stored: how many bits fewer it takes to tell the adapted model the targets.
        epochs: epochs trained.
        n_left_out: records that the last of them left out: too far from complete for the time
            that was left.
        wall_s: seconds, model loading and audit included.
        speed: of the training alone; None if no epoch was trained.
        stopped_because: why training ended.
    """

    out: Path
    certificate: Certificate
    audit: Audit = field(repr=False)
    damage: Damage
    max_damage: float | None
    rank: int
    n_parameters: int
    bits_stored: float
    epochs: int
    n_left_out: int
    wall_s: float
    speed: Speed | None
    stopped_because: str

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.certificate.certified

    @property
    def harmless(self) -> bool:
        """The 95 % interval of the damage lies under the bound, if there is one."""
        return self.max_damage is None or _high(self.damage) <= self.max_damage

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each trained number."""
        return self.bits_stored / self.n_parameters


def write(
    data: Any,
    out: str | Path,
    config: WriteConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> WriteResult:
    """Train an adapter until the model recites every record, and certify it.

    Args:
        data: records: a path, or Python objects; see `read_records`.
        out: folder for adapter, certificate, token table, run log and model card. New or empty,
            or with `resume` the folder of an interrupted run.
        config: the settings; or give them by name.
        observer: is told of progress.
        **settings: fields of `WriteConfig`, instead of `config`.

    Returns:
        What was made. `certified` says whether all records are.

    Raises:
        MemlawError: a child that says what was wrong with data, model, settings or folder;
            nothing has been written then.

    Example:
        >>> result = memlaw.write([("Jerry Becerra:", "9100672710")], "out")  # doctest: +SKIP
        >>> result.certified  # doctest: +SKIP
        True
    """
    config = settled(WriteConfig, config, settings)
    observer = observer or Observer()
    out = Path(out)
    started = time.perf_counter()
    records = read_records(
        data,
        prompt_field=config.prompt_field,
        completion_field=config.completion_field,
        format=config.data_format,
        recite_prompt=config.recite_prompt,
        notice=observer.notice,
    )
    check_out(out, resume=config.resume)
    text, text_name = unseen_text(config.damage_text)
    retained = retained_text(config.retain)
    if sha256_of(retained) == sha256_of(text):
        raise ConfigError(
            "the text to retain is the text to measure damage on: it must be text that training "
            "doesn't see."
        )
    base = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        notice=observer.notice,
    )
    context = base.context_length
    general = windows(base.tokenizer, retained, context=context, name="the text to retain")
    unseen = windows(base.tokenizer, text, context=context)
    run = _Run(
        records=records,
        out=out,
        config=config,
        base=base,
        observer=observer,
        general=general,
        unseen=unseen,
        retained_sha256=sha256_of(retained),
        measure_damage=lambda adapter: measure_damage(
            base.model,
            lambda: adapter.folded().attached(base.model),
            unseen,
            text_name=text_name,
            text=text,
        ),
    )
    stopped_because = run.train()
    audit = run.audit or run.certify()
    damage = run.damage or run.measure_damage(run.learner.adapter)
    return run.finish(audit, damage, stopped_because, started)


def _high(damage: Damage) -> float:
    """Upper end of the 95 % interval of ΔNLL: what a bound is held against."""
    return damage.delta_nll_ci95[1]


@dataclass(frozen=True, kw_only=True)
class _Certified:
    """A certified adapter on the way to less damage."""

    epoch: int
    state: tuple[dict[str, torch.Tensor], dict[str, Any]]
    curve: list[dict[str, Any]]
    audit: Audit
    damage: Damage


class _Run:
    """One run of `write`: what is trained, what it learnt so far, and where it is kept."""

    def __init__(
        self,
        *,
        records: Sequence[Record],
        out: Path,
        config: WriteConfig,
        base: BaseModel,
        observer: Observer,
        general: torch.Tensor,
        unseen: torch.Tensor,
        retained_sha256: str,
        measure_damage: Callable[[Adapter], Damage],
    ) -> None:
        self.measure_damage, self.retained_sha256 = measure_damage, retained_sha256
        self.unseen = unseen
        self.out, self.config, self.base, self.observer = out, config, base, observer
        self.prompt_format = resolve_prompt_format(base.tokenizer, config.prompt_format)
        self.examples = encode(
            records, base.tokenizer, format=self.prompt_format, max_tokens=base.context_length
        )
        self.sites = resolve_sites(base.model, config.placement, config.layers)
        self.max_rank = min(config.max_rank, *(min(s.d_in, s.d_out) for s in self.sites))
        checkpoint = read_checkpoint(out, self._identity()) if config.resume else None
        self.base_audit = self._measure_base()
        rank = self._first_rank()
        statistics: list[Statistics] = []
        if config.whiten or config.retention:
            statistics = measure_statistics(
                base.model,
                self.sites,
                self.examples,
                measure_general(base.model, self.sites, general, seed=config.seed),
            )
        adapter = Adapter(
            self.sites,
            rank=rank,
            seed=config.seed,
            whiteners=[
                Whitener(s, mixture=config.whiten_mixture, damping=config.whiten_damping)
                for s in statistics
                if config.whiten
            ],
            dropout=config.dropout,
        ).to(base.model.device)
        self.learner = Learner(
            adapter, self.examples, config, statistics, max_epochs=config.max_epochs
        )
        self.bank = AdapterBank(self._engine(), [self.learner])
        self.curve: list[dict[str, Any]] = []
        self.snapshots = Snapshots(len(self.learner.seen_p))
        self.audit: Audit | None = None  # of the weights as they are now
        self.damage: Damage | None = None  # likewise
        self.best: _Certified | None = None
        self.look_at_penalty = math.inf
        if checkpoint is not None:
            tensors, content = checkpoint
            self.learner.restore(tensors, content["engine"])
            self.curve = content["curve"]
            if "seen.p" in tensors:
                self.snapshots = Snapshots.from_arrays(
                    tensors["seen.epochs"].numpy(), tensors["seen.p"].numpy()
                )
            observer.notice(f"Going on from epoch {self.learner.epoch}.")

    def _engine(self) -> Engine:
        config, model = self.config, self.base.model
        if config.engine == "plain":
            return PlainEngine(model, self.examples)
        room = {"cache_mb": config.cache_mb, "logits_mb": config.logits_mb}
        if config.engine == "auto":
            return cached_or_plain(
                model, self.sites, self.examples, **room, notice=self.observer.notice
            )
        try:
            return CachedEngine(model, self.sites, self.examples, **room)
        except EngineError as error:
            raise EngineError(f"{error} Use --engine plain.") from error

    def _measure_base(self) -> Audit:
        return audit_examples(
            self.base.model,
            self.base.tokenizer,
            self.examples,
            threshold=self.config.threshold,
            margin=self.config.margin,
            batch_size=self.config.audit_batch_size,
            decode="none",
        )

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

    # ------------------------------------------------------------ training

    def train(self) -> str:
        """Train until certified and harmless, or out of epochs; returns why it ended."""
        learner, config = self.learner, self.config
        confirmed = good = learner.state()  # confirmed: a whole epoch found it to compute numbers
        saved_at = time.perf_counter()
        try:
            was_there = config.max_damage and self.curve and self.curve[-1]["n_under"] == 0
            if was_there and (ended := self._look()):  # a resumed run that was certified before
                return ended
            while learner.epoch < config.max_epochs:
                (stats,) = self.bank.run_epoch()
                if isinstance(stats, DivergedError):
                    raise stats
                confirmed = good
                self.curve.append(asdict(stats))
                self.snapshots.add(stats.epoch, learner.seen_p.numpy())
                self.audit = self.damage = None
                self.observer.epoch(stats, len(self.examples), config.max_epochs)
                if stats.n_under == 0 and learner.penalty().item() <= self.look_at_penalty:
                    if ended := self._look():
                        return ended
                elif self.best is not None:
                    if learner.epoch - self.best.epoch > 2 * _PATIENCE_EPOCHS:
                        return self._settle("no way found to certify with less damage")
                    learner.retention *= _TIGHTER if stats.n_under == 0 else 1 / _TIGHTER
                elif self._is_stuck():
                    self._give_room()
                good = learner.state()
                if time.perf_counter() - saved_at > _CHECKPOINT_EVERY_S:
                    self._write_checkpoint(good)
                    saved_at = time.perf_counter()
            self.audit = self.audit or self.certify()
            if self.audit.certified and config.max_damage is not None:
                self.damage = self.damage or self.measure_damage(learner.adapter)
            if not math.isfinite(self.audit.nll_nats):
                raise DivergedError(f"the loss is not finite after step {learner.n_steps}.")
        except DivergedError as error:
            self.observer.notice(
                f"Stopped: {error} The state after epoch {confirmed[1]['epoch']} is kept."
            )
            learner.restore(*confirmed)
            del self.curve[learner.epoch :]
            self.audit = self.damage = None
            return self._settle(f"diverged: {error}")
        except KeyboardInterrupt:
            if good[1]["epoch"]:
                self._write_checkpoint(good)
            raise
        return self._settle(f"max_epochs ({config.max_epochs}) reached")

    def _look(self) -> str:
        """Training sees success: look as a user will; returns why training is over, if it is."""
        learner, bound = self.learner, self.config.max_damage
        self.audit = self.certify()
        if not self.audit.certified:
            learner.raise_goal()
            return ""
        if bound is None:
            return "certified"
        self.damage = self.measure_damage(learner.adapter)
        found = _high(self.damage)
        if found <= bound:
            return "certified, and below max_damage"
        if self.best is None or found < _high(self.best.damage):
            self.best = _Certified(
                epoch=learner.epoch,
                state=learner.state(),
                curve=list(self.curve),
                audit=self.audit,
                damage=self.damage,
            )
        # The penalty is about proportional to the damage: no look is worth its time until it has
        # come down as far as the damage has to. Till then retention rises with every epoch that
        # leaves no token under the line, and falls with every other.
        self.look_at_penalty = learner.penalty().item() * max(0.5, 0.9 * bound / found)
        learner.retention *= _TIGHTER
        self.observer.notice(f"Certified, but ΔNLL may be {found:+.4f}: retention goes up.")
        return ""

    def _settle(self, why: str) -> str:
        """Training is over: go back to what was certified with less damage, if anything was."""
        here = self.damage if self.audit and self.audit.certified else None
        if self.best and (here is None or _high(self.best.damage) < _high(here)):
            self.learner.restore(*self.best.state)
            self.curve = self.best.curve
            self.audit, self.damage = self.best.audit, self.best.damage
        elif here and self.config.max_damage is not None and _high(here) <= self.config.max_damage:
            return "certified, and below max_damage"
        return why

    def certify(self) -> Audit:
        """Audit the adapter as a user will have it: saved to a folder and loaded from there."""
        with tempfile.TemporaryDirectory(prefix="memlaw-") as folder:
            self._save_adapter(Path(folder))
            with loaded_adapter(Path(folder), self.base.model) as model:
                return audit_examples(
                    model,
                    self.base.tokenizer,
                    self.examples,
                    threshold=self.config.threshold,
                    margin=self.config.margin,
                    batch_size=self.config.audit_batch_size,
                    progress=self.observer.progress,
                )

    def _save_adapter(self, folder: Path) -> None:
        save_adapter(
            self.learner.adapter, folder, base_path=self.base.path, base_sha256=self.base.sha256
        )

    def _is_stuck(self) -> bool:
        """For a while, as things are, neither the loss nor the count under the line has fallen."""
        rank, retention = self.learner.adapter.rank, self.learner.retention
        here = [e for e in self.curve if (e["rank"], e["retention"]) == (rank, retention)]
        before, lately = here[:-_PATIENCE_EPOCHS], here[-_PATIENCE_EPOCHS:]
        return bool(before) and all(
            min(e[key] for e in lately) >= share * min(e[key] for e in before)
            for key, share in (("n_under", 1.0), ("nll_nats", 0.99))
        )

    def _give_room(self) -> None:
        """Raise the rank where that is left to us; else hold on less tightly to general text."""
        learner = self.learner
        if self.config.rank == "auto" and learner.adapter.rank < self.max_rank:
            learner.grow(min(2 * learner.adapter.rank, self.max_rank))
            self.observer.notice(f"No progress: rank raised to {learner.adapter.rank}.")
        elif learner.retention:
            learner.retention /= 4
            self.observer.notice(f"No progress: retention lowered to {learner.retention:g}.")

    # ------------------------------------------------------------ files

    def _identity(self) -> dict[str, Any]:
        """All that decides which weights come out, for `--resume` to compare."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in FREE_TO_CHANGE}
        return json.loads(json.dumps(settings)) | {
            "kind of checkpoint": 2,
            "records": json_sha256([e.record.sha256 for e in self.examples]),
            "base model": self.base.sha256,
            "tokenizer": self.base.tokenizer_sha256,
            "retained text": self.retained_sha256,
        }

    def _write_checkpoint(self, state: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
        tensors, values = state
        curve = self.curve[: values["epoch"]]  # an interrupted epoch may be in it already
        content = {"identity": self._identity(), "engine": values, "curve": curve}
        seen = self.snapshots.until(values["epoch"]).arrays()
        tensors = tensors | {f"seen.{name}": torch.from_numpy(a) for name, a in seen.items()}
        write_checkpoint(self.out, tensors, content)

    def finish(
        self, audit: Audit, damage: Damage, stopped_because: str, started: float
    ) -> WriteResult:
        """Write everything; the certificate last, so that it vouches for what is there."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._save_adapter(self.out)
        certificate = make_certificate(
            audit,
            damage,
            device=self.base.model.device.type,
            prompt_format=self.prompt_format,
            base_model=self.base.path,
            base_sha256=self.base.sha256,
            tokenizer_sha256=self.base.tokenizer_sha256,
            adapter_sha256=adapter_sha256(self.out),
            n_parameters=self.learner.adapter.n_parameters,
            versions=versions(),
        )
        result = WriteResult(
            out=self.out,
            certificate=certificate,
            audit=audit,
            damage=damage,
            max_damage=self.config.max_damage,
            rank=self.learner.adapter.rank,
            n_parameters=self.learner.adapter.n_parameters,
            bits_stored=self.base_audit.total_nll_bits - audit.total_nll_bits,
            epochs=self.learner.epoch,
            n_left_out=self.curve[-1]["n_left_out"] if self.curve else 0,
            wall_s=time.perf_counter() - started,
            speed=measure_speed(self.curve, self.base.model.dtype, self.base.model.device),
            stopped_because=stopped_because,
        )
        if not result.certified or not result.harmless:  # more epochs may still do it
            self._write_checkpoint(self.learner.state())
        audit.write_tokens(self.out / TOKENS_FILE)
        self.snapshots.until(self.learner.epoch).write(self.out / SNAPSHOTS_FILE)
        write_json(self.out / RUN_FILE, self._run_json(result))
        write_text(
            self.out / CARD_FILE,
            model_card(
                result,
                base_spec=self.base.spec,
                is_peft=self.learner.adapter.is_peft,
                sites=[s.module for s in self.sites],
            ),
        )
        write_json(self.out / CERTIFICATE_FILE, certificate.to_json())
        if result.certified and result.harmless:
            (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result

    def _damage_by_window(self, damage: Damage) -> list[dict[str, Any]]:
        return [
            {
                "text": decoded_text(self.base.tokenizer, ids),
                "delta_nll_nats": delta,
                "kl_nats": kl,
            }
            for ids, (delta, kl) in zip(self.unseen.tolist(), damage.by_window, strict=True)
        ]

    def _run_json(self, result: WriteResult) -> dict[str, Any]:
        certificate = result.certificate
        return {
            "format": 1,
            "status": "certified" if result.certified else "not certified",
            "harmless": result.harmless,
            "stopped_because": result.stopped_because,
            "config": asdict(self.config),
            "base": {"spec": self.base.spec, "path": self.base.path, "sha256": self.base.sha256},
            "tokenizer_sha256": self.base.tokenizer_sha256,
            "prompt_format": self.prompt_format,
            "dtype": self.base.dtype,
            "device": certificate.device,
            "records": {
                "n": certificate.n_records,
                "sha256": certificate.records_sha256,
                "n_target_tokens": len(result.audit.tokens.token_id),
            },
            "adapter": {
                "rank": result.rank,
                "n_parameters": result.n_parameters,
                "sha256": certificate.adapter_sha256,
                "sites": [asdict(site) for site in self.sites],
            },
            "results": {
                "n_certified": result.audit.n_certified,
                "n_recalled": result.audit.n_recalled,
                "base_nll_nats": self.base_audit.nll_nats,
                "nll_nats": result.audit.nll_nats,
                "bits_stored": result.bits_stored,
                "bits_per_parameter": result.bits_per_parameter,
                "damage": result.damage.to_json(),
                "damage_by_window": self._damage_by_window(result.damage),
            },
            "timings": {
                "wall_s": result.wall_s,
                "training_s": sum(e["wall_s"] for e in self.curve),
                "speed": asdict(result.speed) if result.speed else None,
            },
            "epochs": result.epochs,
            "curve": self.curve,
            "versions": certificate.versions,
            "machine": machine(),
        }
