"""Write records into a model: train an adapter until the certificate holds, and hand both over."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from memlaw.adapters import (
    Adapter,
    Layers,
    adapter_sha256,
    loaded_adapter,
    resolve_sites,
    save_adapter,
)
from memlaw.bank import AdapterBank
from memlaw.cached import CachedEngine
from memlaw.card import model_card
from memlaw.certificate import CERTIFICATE_FILE, Certificate, make_certificate
from memlaw.damage import Damage, measure_damage, retained_text, unseen_text, windows
from memlaw.engine import Engine, PlainEngine
from memlaw.errors import ConfigError
from memlaw.folder import (
    CARD_FILE,
    CHECKPOINT_FILE,
    RUN_FILE,
    TOKENS_FILE,
    check_out,
    read_checkpoint,
    write_checkpoint,
)
from memlaw.learner import DivergedError, EpochStats, Learner, TrainConfig
from memlaw.models import EMBEDDED, BaseModel, DType, load_model
from memlaw.objectives import resolve_objective
from memlaw.precondition import Statistics, Whitener, measure_statistics
from memlaw.recall import Audit, audit_examples
from memlaw.records import (
    RECITE_PROMPT,
    DataFormat,
    PromptFormat,
    Record,
    encode,
    read_records,
    resolve_prompt_format,
)
from memlaw.store import json_sha256, write_json, write_text

_CHECKPOINT_EVERY_S = 5.0
_START_BITS_PER_PARAMETER = 0.1
_PATIENCE_EPOCHS = 40
# Settings that a resumed run may change: they say where and how long, not what.
_FREE_TO_CHANGE = (
    "max_epochs",
    "max_rank",
    "resume",
    "device",
    "damage_text",
    "audit_batch_size",
    "cache_mb",
    "logits_mb",
    "prompt_field",
    "completion_field",
    "data_format",
)


@dataclass(frozen=True, kw_only=True)
class WriteConfig(TrainConfig):
    """What to write into what, and how.

    Attributes:
        model: embedded (SmolLM2-135M-Instruct), a hub id, a model folder, or a GGUF file.
        rank: the adapter's rank; auto starts small and grows while records are missing.
        max_rank: where auto stops growing.
        placement: down_proj, mlp (in parallel with the MLP block), attn, all-linear, or names of
            linear modules joined by commas.
        layers: decoder layers from 0; auto is two thirds of the way up; all.
        engine: cached computes what training can't change once; plain is the short reference,
            the same numbers but for rounding, slower.
        cache_mb: the cached engine keeps activations beyond so many megabytes in a temporary file.
        logits_mb: about how much memory the cached engine's logits may take, in megabytes.
        max_epochs: give up after so many.
        dtype: what the model computes in; auto is what plain from_pretrained uses.
        device: auto takes CUDA, then MPS, then the CPU.
        prompt_field: name of the prompt's field in the data (default: prompt).
        completion_field: name of the completion's field (default: completion).
        data_format: what the data file is; auto goes by its suffix.
        prompt_format: chat uses the tokenizer's chat template, plain the bare text; auto is chat
            where there is a template.
        recite_prompt: the prompt that a plain text file is recited on.
        damage_text: text to measure damage on (default: Python's language reference).
        audit_batch_size: records a forward pass in the audit.
        trust_remote_code: run code that the model's authors ship with it.
        resume: go on from the checkpoint in the output folder, if there is one.
    """

    model: str = EMBEDDED
    rank: int | Literal["auto"] = "auto"
    max_rank: int = 64
    placement: str = "down_proj"
    layers: Layers = "auto"
    engine: Literal["cached", "plain"] = "cached"
    cache_mb: float = 4096
    logits_mb: float = 512
    max_epochs: int = 1000
    dtype: DType = "auto"
    device: str = "auto"
    prompt_field: str | None = None
    completion_field: str | None = None
    data_format: DataFormat = "auto"
    prompt_format: PromptFormat = "auto"
    recite_prompt: str = RECITE_PROMPT
    damage_text: str | None = None
    audit_batch_size: int = 16
    trust_remote_code: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        resolve_objective(self.objective)
        if not 0.5 <= self.threshold < 1:
            raise ConfigError(
                f"threshold {self.threshold:g} is out of range [0.5, 1): at 0.5 and under, a "
                "token need not be the argmax."
            )
        if not (self.margin >= 0 and self.threshold + self.margin < 1):
            raise ConfigError(
                f"margin {self.margin:g} is out of range: 0 to under {1 - self.threshold:g} for "
                f"threshold {self.threshold:g}."
            )
        positive = {
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "max_grad_norm": self.max_grad_norm,
            "max_epochs": self.max_epochs,
            "max_rank": self.max_rank,
            "audit_batch_size": self.audit_batch_size,
            "cache_mb": self.cache_mb,
            "logits_mb": self.logits_mb,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} is {value:g}; it must be above 0.")
        if not self.learning_rate < 3.4e37:
            raise ConfigError(f"learning_rate is {self.learning_rate:g}; float32 can't hold it.")
        if not 0 <= self.whiten_mixture <= 1:
            raise ConfigError(f"whiten_mixture is {self.whiten_mixture:g}; it must be 0 to 1.")
        if not 1e-6 <= self.whiten_damping <= 1e6:
            raise ConfigError(f"whiten_damping is {self.whiten_damping:g}; it must be 1e-6 to 1e6.")
        if not 0 <= self.retention <= 1e6:
            raise ConfigError(f"retention is {self.retention:g}; it must be 0 to 1e6.")
        if self.rank != "auto" and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more, or auto.")
        if list(self.curriculum_epochs) != sorted(self.curriculum_epochs):
            raise ConfigError(f"curriculum_epochs {self.curriculum_epochs} must not fall.")


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """What `write` made.

    Attributes:
        out: the folder.
        certificate: what was found.
        audit: the verdicts and the token table.
        damage: change on unseen text.
        rank: the adapter's.
        n_parameters: trained numbers.
        bits_stored: how many bits fewer it takes to tell the adapted model the targets.
        epochs: epochs trained.
        wall_s: seconds, model loading and audit included.
        stopped_because: why training ended.
    """

    out: Path
    certificate: Certificate
    audit: Audit = field(repr=False)
    damage: Damage
    rank: int
    n_parameters: int
    bits_stored: float
    epochs: int
    wall_s: float
    stopped_because: str

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.certificate.certified

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each trained number."""
        return self.bits_stored / self.n_parameters


class Observer:
    """Is told how a run goes. Does nothing; override what you want to know."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def epoch(self, stats: EpochStats, n_records: int, max_epochs: int) -> None:
        """An epoch is done."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A phase of an audit has done so many of its records."""


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
    if config is not None and settings:
        raise ConfigError("give either config or settings by name, not both.")
    config = config or _config(settings)
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
    base = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        notice=observer.notice,
    )
    damage_windows = windows(base.tokenizer, text, context=base.context_length)
    run = _Run(records=records, out=out, config=config, base=base, observer=observer)
    stopped_because = run.train()
    if run.audit is None:
        run.audit = run.certify()
    damage = measure_damage(
        base.model,
        lambda: run.learner.adapter.attached(base.model),
        damage_windows,
        text_name=text_name,
        text=text,
    )
    return run.finish(run.audit, damage, stopped_because, started)


def _config(settings: dict[str, Any]) -> WriteConfig:
    known = {f.name for f in dataclasses.fields(WriteConfig)}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(
            f"unknown setting(s) {', '.join(unknown)}. There are {', '.join(sorted(known))}."
        )
    if isinstance(settings.get("layers"), int):
        settings["layers"] = (settings["layers"],)
    if isinstance(settings.get("layers"), list):
        settings["layers"] = tuple(settings["layers"])
    if isinstance(settings.get("objective"), str):
        settings["objective"] = resolve_objective(settings["objective"])
    return WriteConfig(**settings)


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
    ) -> None:
        self.out, self.config, self.base, self.observer = out, config, base, observer
        self.prompt_format = resolve_prompt_format(base.tokenizer, config.prompt_format)
        self.examples = encode(
            records, base.tokenizer, format=self.prompt_format, max_tokens=base.context_length
        )
        self.sites = resolve_sites(base.model, config.placement, config.layers)
        self.max_rank = min(config.max_rank, *(min(s.d_in, s.d_out) for s in self.sites))
        checkpoint = read_checkpoint(out, self._identity()) if config.resume else None
        self.base_audit = self._measure_base()
        rank = config.rank if config.rank != "auto" else self._first_rank()
        statistics = self._measure_statistics() if config.whiten or config.retention else []
        adapter = Adapter(
            self.sites,
            rank=rank,
            seed=config.seed,
            whiteners=[
                Whitener(s, mixture=config.whiten_mixture, damping=config.whiten_damping)
                for s in statistics
                if config.whiten
            ],
        ).to(base.model.device)
        engine: Engine
        if config.engine == "cached":
            engine = CachedEngine(
                base.model,
                self.sites,
                self.examples,
                cache_mb=config.cache_mb,
                logits_mb=config.logits_mb,
            )
        else:
            engine = PlainEngine(base.model, self.examples)
        self.learner = Learner(adapter, self.examples, config, statistics)
        self.bank = AdapterBank(engine, [self.learner])
        self.curve: list[dict[str, Any]] = []
        self.audit: Audit | None = None
        if checkpoint is not None:
            tensors, content = checkpoint
            self.learner.restore(tensors, content["engine"])
            self.curve = content["curve"]
            observer.notice(f"Going on from epoch {self.learner.epoch}.")

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

    def _measure_statistics(self) -> list[Statistics]:
        base = self.base
        text = windows(base.tokenizer, retained_text(), context=base.context_length)
        return measure_statistics(
            base.model, self.sites, self.examples, text, seed=self.config.seed
        )

    def _first_rank(self) -> int:
        """A power of two with room to spare: about a tenth of a bit for each parameter."""
        width = sum(s.d_in + s.d_out for s in self.sites)
        rank = 1
        while rank * width * _START_BITS_PER_PARAMETER < self.base_audit.total_nll_bits:
            rank *= 2
        return min(rank, self.max_rank)

    # ------------------------------------------------------------ training

    def train(self) -> str:
        """Train until certified or out of epochs; returns why it ended."""
        learner, config = self.learner, self.config
        confirmed = good = learner.state()  # confirmed: a whole epoch found it to compute numbers
        saved_at = time.perf_counter()
        try:
            while learner.epoch < config.max_epochs:
                (stats,) = self.bank.run_epoch()
                if isinstance(stats, DivergedError):
                    raise stats
                confirmed = good
                self.curve.append(asdict(stats))
                self.audit = None
                self.observer.epoch(stats, len(self.examples), config.max_epochs)
                if stats.n_under == 0:
                    self.audit = self.certify()
                    if self.audit.certified:
                        return "certified"
                    learner.raise_goal()
                if self._is_stuck():
                    self._give_room()
                good = learner.state()
                if time.perf_counter() - saved_at > _CHECKPOINT_EVERY_S:
                    self._write_checkpoint(good)
                    saved_at = time.perf_counter()
            self.audit = self.certify()
            if not math.isfinite(self.audit.nll_nats):
                raise DivergedError(f"the loss is not finite after step {learner.n_steps}.")
        except DivergedError as error:
            self.observer.notice(
                f"Stopped: {error} The state after epoch {confirmed[1]['epoch']} is kept."
            )
            learner.restore(*confirmed)
            del self.curve[learner.epoch :]
            self.audit = None
            return f"diverged: {error}"
        except KeyboardInterrupt:
            if good[1]["epoch"]:
                self._write_checkpoint(good)
            raise
        return f"max_epochs ({config.max_epochs}) reached"

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
            learner.retention = learner.retention / 4 if learner.retention > 0.1 else 0.0
            self.observer.notice(f"No progress: retention lowered to {learner.retention:g}.")

    # ------------------------------------------------------------ files

    def _identity(self) -> dict[str, Any]:
        """All that decides which weights come out, for `--resume` to compare."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in _FREE_TO_CHANGE}
        return json.loads(json.dumps(settings)) | {
            "records": json_sha256([e.record.sha256 for e in self.examples]),
            "base model": self.base.sha256,
            "tokenizer": self.base.tokenizer_sha256,
        }

    def _write_checkpoint(self, state: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
        tensors, values = state
        curve = self.curve[: values["epoch"]]  # an interrupted epoch may be in it already
        content = {"identity": self._identity(), "engine": values, "curve": curve}
        write_checkpoint(self.out, tensors, content)

    def finish(
        self, audit: Audit, damage: Damage, stopped_because: str, started: float
    ) -> WriteResult:
        """Write everything; the certificate last, so that it vouches for what is there."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not audit.certified:  # more epochs may still do it
            self._write_checkpoint(self.learner.state())
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
            rank=self.learner.adapter.rank,
            n_parameters=self.learner.adapter.n_parameters,
            bits_stored=self.base_audit.total_nll_bits - audit.total_nll_bits,
            epochs=self.learner.epoch,
            wall_s=time.perf_counter() - started,
            stopped_because=stopped_because,
        )
        audit.write_tokens(self.out / TOKENS_FILE)
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
        if audit.certified:
            (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result

    def _run_json(self, result: WriteResult) -> dict[str, Any]:
        certificate = result.certificate
        return {
            "format": 1,
            "status": "certified" if result.certified else "not certified",
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
                "damage": asdict(result.damage),
            },
            "timings": {
                "wall_s": result.wall_s,
                "training_s": sum(e["wall_s"] for e in self.curve),
            },
            "epochs": result.epochs,
            "curve": self.curve,
            "versions": certificate.versions,
            "machine": {
                "platform": platform.platform(),
                "n_cpus": os.cpu_count(),
                "n_threads": torch.get_num_threads(),
            },
        }


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    names = ("memlaw", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
