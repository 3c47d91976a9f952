"""The settings of `audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import PromptFormat
from memlaw.data.readers import DataFormat
from memlaw.settings.choices import Decode, DType


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Settings of `audit`. What is not given is taken from the run that made the adapter.

    Attributes:
        adapter: folder that memlaw write or PEFT wrote (default: none, audit the base model).
        model: base model (default: the adapter's own, else the embedded one).
        tokenizer: folder or hub id of the tokenizer (default: the adapter folder's own, else the
            base model's).
        dtype: dtype to compute in; auto is the one that the adapter was certified in, else what
            plain from_pretrained uses.
        device: torch device; auto is CUDA if there is one, else MPS, else the CPU.
        batch_size: records per forward pass, at most.
        decode: also decode greedily: all records, none, or this many, evenly spread.
        threshold: a certified token has p ≥ threshold + margin (default: the run's, else 0.5).
        margin: how far above the threshold, against rounding (default: the run's, else 0.05).
        prompt_field: name of the prompt's field in the data (default: the run's, else prompt).
        completion_field: name of the completion's field in the data (default: the run's, else
            completion).
        data_format: format of the data file; auto goes by its suffix.
        prompt_format: chat, plain, or auto: the run's, else chat where there is a template.
        recite_prompt: prompt for a plain text file (default: the run's).
        specificity: also measure whether the model answers other prompts as the base model does,
            and ΔNLL on documentation, prose and chats.
        near: file of prompts like the records' for which nothing is stored, one a line or JSONL
            with prompt (default: the run's).
        trust_remote_code: run Python code that comes with the model.
    """

    adapter: Path | None = None
    model: str | None = None
    tokenizer: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    batch_size: int = 64
    decode: Decode = "all"
    threshold: float | None = None
    margin: float | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    data_format: DataFormat = "auto"
    prompt_format: PromptFormat = "auto"
    recite_prompt: str | None = None
    specificity: bool = False
    near: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if isinstance(self.decode, int) and self.decode < 0:
            raise ConfigError(f"decode is {self.decode}; give a count, all or none.")
        if self.threshold is not None and not 0.5 <= self.threshold < 1:
            raise ConfigError(f"threshold {self.threshold:g} is out of range [0.5, 1).")
        if self.margin is not None and not 0 <= self.margin < 1 - (self.threshold or 0.5):
            raise ConfigError(f"margin {self.margin:g} is out of range: threshold + margin < 1.")
