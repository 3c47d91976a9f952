"""The settings of `probe`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import PromptFormat
from memlaw.data.tasks import parse_task
from memlaw.settings.choices import EMBEDDED, DType, Layers, Objective, OnEmpty, resolve_objective
from memlaw.settings.train import TrainConfig, step_size

DEFAULT_STEPS = 150
_LEARNING_RATE = 5e-2
_CURRICULUM = (1 / 15, 2 / 15, 3 / 15, 4 / 15)  # of the epochs: the published 20, 40, 60, 80 of 300


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of `probe`: the grid, the model and the training.

    Attributes:
        task: what to remember: phonebook; noise, or noise:RATIO with this share of random tokens,
            0 to 1; text:FILE; or records:FILE.
        ranks: ranks of the adapters.
        lengths: target tokens to remember, end tokens included; records are taken while they fit.
        seeds: random seeds of data, initialisation and record order; a cell for each.
        recipe: default trains as memlaw write does (whitening, retention) with a linear decay of
            the learning rate; paper is the published probe: adapter in parallel with the MLP
            block, AdamW without whitening or retention, linear decay, dropout 0.1.
        steps: optimiser steps, rounded up to whole epochs (default: 150; with the paper's recipe
            2,000, or 200 epochs of phonebook or records).
        objective: how the loss weights target tokens; see memlaw write.
        on_empty: what memft_threshold does with a batch whose tokens are all learnt (default:
            skip; paper: sft).
        learning_rate: learning rate of AdamW, at its highest (default: 5e-2; paper: 1e-2).
        batch_size: records per step (default: the recipe's).
        retention: weight of the KL penalty on general text; see memlaw write (default: the
            recipe's).
        whiten: train in whitened coordinates; see memlaw write (default: the recipe's).
        placement: modules that get an adapter; see memlaw write (default: the recipe's).
        layers: decoder layers that get an adapter, counted from 0; auto is the one two thirds of
            the way up; all.
        model: base model: embedded (SmolLM2-135M-Instruct), a hub id, a model folder, or a GGUF
            file.
        tokenizer: folder or hub id of the tokenizer (default: the base model's own).
        dtype: dtype that the model computes in; auto is what plain from_pretrained uses.
        device: torch device; auto is CUDA if there is one, else MPS, else the CPU.
        prompt_format: chat uses the tokenizer's chat template, plain the bare text; auto is chat
            where there is a template.
        natural_text: file with the text in which noise replaces tokens (default: prose from
            Python's library).
        retain: text on which predictions should stay unchanged (default: as memlaw write).
        damage_text: unseen text on which ΔNLL is measured (default: as memlaw write).
        decode: also decode greedily, not only one teacher-forced pass. Slow.
        cache_mb: precomputed activations above this many megabytes go to a temporary file.
        logits_mb: approximate limit of the memory for the cached engine's logits, in megabytes.
        trust_remote_code: run Python code that comes with the model.
    """

    task: str = "noise"
    ranks: tuple[int, ...] = (1, 2, 3, 4, 6)
    lengths: tuple[int, ...] = (32, 64, 128, 192, 256)
    seeds: tuple[int, ...] = (0,)
    recipe: Literal["default", "paper"] = "default"
    steps: int | None = None
    objective: Objective = "sft"
    on_empty: OnEmpty | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    retention: float | None = None
    whiten: bool | None = None
    placement: str | None = None
    layers: Layers = "auto"
    model: str = EMBEDDED
    tokenizer: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    prompt_format: PromptFormat = "auto"
    natural_text: str | None = None
    retain: str | None = None
    damage_text: str | None = None
    decode: bool = False
    cache_mb: float = 4096
    logits_mb: float = 512
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        parse_task(self.task)
        resolve_objective(self.objective)
        for name, least in (("ranks", 1), ("lengths", 2), ("seeds", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ConfigError(
                    f"{name} {', '.join(map(str, values)) or '(none)'}: give at least one, each "
                    f"{least} or more."
                )
        for name in ("steps", "learning_rate", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 3.4e37:
                raise ConfigError(f"{name} is {value:g}; it must be above 0, and finite.")
        if self.retention is not None and not 0 <= self.retention <= 1e6:
            raise ConfigError(f"retention is {self.retention:g}; it must be 0 to 1e6.")

    @property
    def resolved_placement(self) -> str:
        """The placement: the one given, else the recipe's."""
        return self.placement or ("mlp" if self.recipe == "paper" else "down_proj")

    def training(self, seed: int, n_records: int, n_tokens: int) -> TrainConfig:
        """The complete training settings for the cells of a seed.

        Args:
            seed: the seed.
            n_records, n_tokens: number of records and of their target tokens.
        """
        long = parse_task(self.task).kind in ("noise", "text")
        config = TrainConfig(
            seed=seed,
            objective=resolve_objective(self.objective),
            learning_rate=_LEARNING_RATE,
            schedule="linear",
        )
        if self.recipe == "paper":
            config = dataclasses.replace(
                config,
                learning_rate=1e-2,
                betas=(0.9, 0.999),
                batch_size=1 if long else _paper_batch_size(n_tokens),
                dropout=0.1,
                whiten=False,
                retention=0.0,
                margin=0.0,  # MemFT trains what is under p 0.5, not a margin beyond
                on_empty="sft",
            )
        config = dataclasses.replace(
            config, **{name: v for name, v in self.overrides.items() if v is not None}
        )
        n_batches = -(-n_records // step_size(config.batch_size, n_records))
        if self.steps is not None or self.recipe == "default":
            epochs = -(-(self.steps or DEFAULT_STEPS) // n_batches)
        else:
            epochs = 2000 if long else 200
        return dataclasses.replace(
            config,
            total_steps=epochs * n_batches,
            curriculum_epochs=tuple(round(epochs * share) for share in _CURRICULUM),  # type: ignore[arg-type]
        )

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings given in place of the recipe's, by name; None where the recipe's holds."""
        names = ("on_empty", "learning_rate", "batch_size", "retention", "whiten")
        return {name: getattr(self, name) for name in names}


def _paper_batch_size(n_tokens: int) -> int:
    """Records per step in the published probe, for this many target tokens."""
    if n_tokens <= 4000:
        return 4
    return 8 if n_tokens <= 24_000 else 16
