"""The settings of `write`."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, Literal

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import PromptFormat
from memlaw.data.readers import RECITE_PROMPT, DataFormat
from memlaw.data.rendering import PromptRendering
from memlaw.settings.choices import (
    EMBEDDED,
    DType,
    EngineChoice,
    Layers,
    Objective,
    check_template_args,
    resolve_objective,
    whole_path,
)
from memlaw.settings.forms import Form, forms_named
from memlaw.settings.recipe import RECIPE
from memlaw.settings.train import TrainConfig

_PATHS = ("model", "tokenizer", "retain", "damage_text", "keep", "near", "paraphrases")
BOUNDS = ("max_damage", "min_specificity")  # on kinds of harm; what holds them is retention
# Settings that a resumed run may change: they say where and how long, not what. With triage a later
# end also decides which records are still worth training.
FREE_TO_CHANGE = (
    *BOUNDS,
    "robust_to",
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
    "delimiter",
    "skip_bad",
)
# What a checkpoint was trained with that doesn't name a setting, where that isn't today's default.
BEFORE: dict[str, Any] = {"specificity": False}


@dataclass(frozen=True, kw_only=True)
class WriteConfig(TrainConfig):
    """Settings of `write`: the model, the adapter, the training and its limits.

    Attributes:
        objective: how the loss weights target tokens. auto: sft with specificity, else triage. sft:
            all alike; memft_threshold, memft_window, memft_curriculum: as in the MemFT paper, those
            not learnt yet; triage: those that can still be learnt before training ends, whole
            records first.
        learning_rate: learning rate of AdamW, at its highest; auto: 1.5e-2 with specificity, else
            1e-2.
        batch_size: records per step, at most; auto is a tenth of the records, from 10 to 100; with
            specificity a fifth, from 20 (of up to 20 records: 10) to 100.
        keep: file of prompts whose answers must not change, as far as training can hold them: one
            a line, or JSONL with the field prompt or messages.
        model: base model: embedded (SmolLM2-135M-Instruct), a hub id, a model folder, or a GGUF
            file.
        tokenizer: folder or hub id of the tokenizer, with its chat template (default: the base
            model's). It is saved beside the adapter.
        rank: rank of the adapter; auto starts small and grows while records are not learnt.
        max_rank: largest rank that auto grows to.
        placement: modules that get an adapter: down_proj, mlp (in parallel with the MLP block),
            attn, all-linear, or names of linear modules joined by commas.
        layers: decoder layers that get an adapter, counted from 0; auto is the one two thirds of
            the way up, with specificity six from there on; all.
        engine: how training runs. cached: precompute the frozen activations once; plain: a full
            forward pass each step, slower, equal but for rounding; auto: cached where the model
            allows it.
        cache_mb: precomputed activations above this many megabytes go to a temporary file.
        logits_mb: approximate limit of the memory for the cached engine's logits, in megabytes.
        retain: text on which predictions should stay unchanged (default: half of the topics of
            Python's language reference).
        max_damage: keep training until the upper end of the 95 % interval of ΔNLL on unseen text
            is at most this, in nats per token (default: measure only).
        specificity: train so that other prompts are answered as before, and measure whether they
            are: everyday questions, prompts of its own, prompts like the records'; and ΔNLL on
            prose and chats.
        min_specificity: keep training until at least this share of other prompts is answered as
            before, of what rounding leaves, and at most 1 less this share of near misses gets an
            answer made up, by the 95 % intervals, and none a stored one (default: measure only).
        robust_to: forms of the survival table, as merged-bf16,gguf-q8_0: keep training until
            every record is certified in each of these, too.
        near: file of prompts like the records' for which nothing is stored, one a line or JSONL
            with prompt; measured besides those that are made from the records.
        activated: text from which on the adapter is active; every prompt must contain it. A prompt
            without it gets the base model's answer, bit for bit, so training is as without
            specificity, and retention is off (default: the adapter is always active).
        max_epochs: stop after this many epochs, certified or not.
        dtype: dtype that the model computes in; auto is what plain from_pretrained uses.
        device: torch device; auto is CUDA if there is one, else MPS, else the CPU.
        prompt_field: name of the prompt's field in the data (default: prompt).
        completion_field: name of the completion's field in the data (default: completion).
        data_format: format of the data file; auto goes by its suffix.
        delimiter: what is between the cells of a CSV file: one character, or tab (default: found
            out from the first line).
        skip_bad: leave out rows that can't be used, and list them in skipped_rows.jsonl in the
            output folder.
        prompt_format: chat uses the tokenizer's chat template, plain the bare text; auto is chat
            where there is a template.
        prompt_rendering: conversation: the prompt is what the chat template renders for the whole
            conversation, up to the answer; generation: what it renders with its generation prompt.
            They differ only where the template puts text between the two.
        template_args: arguments of the chat template, as enable_thinking=false; a value is JSON, or
            else text.
        recite_prompt: prompt for a plain text file, which has none of its own.
        paraphrases: file with other phrasings of the records' prompts, JSONL with prompt and
            paraphrases; one in four of a record's phrasings is held out, and generality measured on
            it.
        damage_text: unseen text on which ΔNLL is measured (default: the other half of the topics
            that retain uses).
        audit_batch_size: records per forward pass in the audit, at most.
        trust_remote_code: run Python code that comes with the model.
        resume: continue from the checkpoint in the output folder, if there is one.
    """

    objective: Objective | Literal["auto"] = "auto"  # type: ignore[assignment]
    learning_rate: float | Literal["auto"] = "auto"  # type: ignore[assignment]
    keep: str | None = None
    model: str = EMBEDDED
    tokenizer: str | None = None
    rank: int | Literal["auto"] = "auto"
    max_rank: int = 64
    placement: str = "down_proj"
    layers: Layers = "auto"
    engine: EngineChoice = "auto"
    cache_mb: float = 4096
    logits_mb: float = 512
    retain: str | None = None
    max_damage: float | None = None
    specificity: bool = True
    min_specificity: float | None = None
    robust_to: tuple[str, ...] = ()
    near: str | None = None
    activated: str | None = None
    max_epochs: int = 1000
    dtype: DType = "auto"
    device: str = "auto"
    prompt_field: str | None = None
    completion_field: str | None = None
    data_format: DataFormat = "auto"
    delimiter: str | None = None
    skip_bad: bool = False
    prompt_format: PromptFormat = "auto"
    prompt_rendering: PromptRendering | None = None
    template_args: tuple[str, ...] = ()
    recite_prompt: str = RECITE_PROMPT
    paraphrases: str | None = None
    damage_text: str | None = None
    audit_batch_size: int = 64
    trust_remote_code: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        check_template_args(self.template_args)
        if self.objective != "auto":
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
            "learning_rate": 1.0 if self.learning_rate == "auto" else self.learning_rate,
            "batch_size": 1 if self.batch_size == "auto" else self.batch_size,
            "max_grad_norm": self.max_grad_norm,
            "max_epochs": self.max_epochs,
            "max_rank": self.max_rank,
            "audit_batch_size": self.audit_batch_size,
            "logits_mb": self.logits_mb,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} is {value:g}; it must be above 0.")
        if not self.cache_mb >= 0:
            raise ConfigError(f"cache_mb is {self.cache_mb:g}; it must be 0 or more.")
        if self.learning_rate != "auto" and not self.learning_rate < 3.4e37:
            raise ConfigError(f"learning_rate is {self.learning_rate:g}; float32 can't hold it.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; each must be 0 to under 1.")
        if not 0 <= self.whiten_mixture <= 1:
            raise ConfigError(f"whiten_mixture is {self.whiten_mixture:g}; it must be 0 to 1.")
        if not 1e-6 <= self.whiten_damping <= 1e6:
            raise ConfigError(f"whiten_damping is {self.whiten_damping:g}; it must be 1e-6 to 1e6.")
        if not 0 <= self.retention <= 1e6:
            raise ConfigError(f"retention is {self.retention:g}; it must be 0 to 1e6.")
        for name in BOUNDS:
            if (bound := getattr(self, name)) is not None:
                if not bound > 0:
                    raise ConfigError(f"{name} is {bound:g}; it must be above 0.")
                if not self.retention and self.activated is None:
                    raise ConfigError(
                        f"{name} needs a retention above 0: that is what it turns up."
                    )
        if self.min_specificity is not None and not self.min_specificity < 1:
            raise ConfigError(
                f"min_specificity is {self.min_specificity:g}; it must be under 1: a share."
            )
        if self.rank != "auto" and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more, or auto.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout:g}; it must be 0 to under 1.")
        if (self.schedule == "linear") != (self.total_steps is not None):
            raise ConfigError("schedule linear and total_steps go together: give both or neither.")
        if self.total_steps is not None and self.total_steps < 1:
            raise ConfigError(f"total_steps is {self.total_steps}; it must be 1 or more.")
        if list(self.curriculum_epochs) != sorted(self.curriculum_epochs):
            raise ConfigError(f"curriculum_epochs {self.curriculum_epochs} must not fall.")
        for name in ("keep", "min_specificity"):
            if getattr(self, name) is None:
                continue
            if self.activated is not None:
                raise ConfigError(
                    f"{name} is for adapters that are always active: activated trains the records "
                    f"alone. Leave {name} out."
                )
            if not self.specificity:
                raise ConfigError(f"{name} needs specificity: that is what holds answers.")
        if cannot := [form.name for form in self.forms if form.merged and not self.can_merge]:
            raise ConfigError(
                f"robust_to names {cannot[0]}, but no weight can take in an activated adapter, or "
                "one of placement mlp. Leave it out."
            )
        if self.activated is not None:
            if not self.activated.strip():
                raise ConfigError("activated is blank. Give a text that every prompt contains.")
            if self.retention not in (0, TrainConfig.retention):
                raise ConfigError(
                    f"retention is {self.retention:g}, but an activated adapter does nothing to "
                    "other text. Leave retention out."
                )

    @property
    def forms(self) -> list[Form]:
        """The forms that `robust_to` names."""
        return forms_named(self.robust_to, "robust_to")

    @property
    def can_merge(self) -> bool:
        """The base model's weights can take in the adapter."""
        return self.activated is None and self.placement != "mlp"

    @property
    def holds(self) -> bool:
        """Training holds other prompts' answers: specificity, where the adapter is always active.

        An activated adapter leaves them as they are. Without `holds`, specificity only measures.
        """
        return self.specificity and self.activated is None

    def recorded(self) -> dict[str, Any]:
        """For `run.json`: paths from the root on, so that they are the same from elsewhere."""
        content = asdict(self)
        for name in _PATHS:
            if isinstance(content[name], str):
                content[name] = whole_path(content[name])
        return content

    def resolved(self) -> WriteConfig:
        """The same with what follows from other settings.

        That is what auto stands for in `objective` and `learning_rate`; and no retention where
        nothing is at risk.
        """
        usual: dict[str, Any] = {
            name: getattr(RECIPE if self.holds else TrainConfig, name)
            for name in ("objective", "learning_rate")
            if getattr(self, name) == "auto"
        }
        if self.activated is not None:
            usual["retention"] = 0.0
        return dataclasses.replace(self, **usual)
