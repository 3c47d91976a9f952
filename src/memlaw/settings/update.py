"""The settings of `diff` and `update`: what may be other than when the folder was written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from memlaw.core.errors import ConfigError
from memlaw.data.readers import DataFormat
from memlaw.settings.write import WriteConfig

Forget = Literal["suppress", "rewrite"]
_OWN = ("forget",)  # the others are the run's, where they aren't given


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Settings of `update`. What isn't given is as it was when the folder was written.

    Attributes:
        forget: what becomes of removed records. suppress: this adapter is trained until it no
            longer gives them, or, where that costs too much, as with rewrite; rewrite: an adapter
            is trained anew, on the other records alone.
        model: base model, where it now lies elsewhere; it must be the same one.
        keep: file of prompts whose answers must not change, where it now lies or with others in it.
        near: file of prompts for which nothing is stored, likewise.
        paraphrases: file of other phrasings, likewise.
        retain: text on which predictions should stay unchanged, likewise.
        damage_text: unseen text on which ΔNLL is measured, likewise.
        max_epochs: stop after this many epochs, and leave the folder as it was.
        max_rank: largest rank that auto grows to.
        max_damage: keep training until the upper end of the 95 % interval of ΔNLL on unseen text,
            against the bare model, is at most this, in nats per token; else refuse.
        min_specificity: likewise, until at least this share of other prompts is answered as by the
            bare model; see memlaw write.
        device: torch device; auto is CUDA if there is one, else MPS, else the CPU.
        prompt_field: name of the prompt's field in the data.
        completion_field: name of the completion's field in the data.
        data_format: format of the data file; auto goes by its suffix.
        delimiter: what is between the cells of a CSV file: one character, or tab.
        skip_bad: leave out rows that can't be used; without it, too, if the folder was written so.
        audit_batch_size: records per forward pass in the audit, at most.
        trust_remote_code: run Python code that comes with the model. What the folder was written
            with doesn't count: it may be another's.
    """

    forget: Forget = "suppress"
    model: str | None = None
    keep: str | None = None
    near: str | None = None
    paraphrases: str | None = None
    retain: str | None = None
    damage_text: str | None = None
    max_epochs: int | None = None
    max_rank: int | None = None
    max_damage: float | None = None
    min_specificity: float | None = None
    device: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    data_format: DataFormat | None = None
    delimiter: str | None = None
    skip_bad: bool = False
    audit_batch_size: int | None = None
    trust_remote_code: bool = False

    def over(self, run: dict[str, Any]) -> WriteConfig:
        """The settings to train with: those of a run, with what is given here instead.

        Args:
            run: the content of its `run.json`.

        Raises:
            ConfigError: a setting out of range, or a run whose settings can't be read.
        """
        known = {f.name for f in dataclasses.fields(WriteConfig)}
        then: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in _config_of(run).items()
            if name in known
        }
        now = {
            f.name: value
            for f in dataclasses.fields(self)
            if f.name not in _OWN and (value := getattr(self, f.name)) is not None
        }
        now["skip_bad"] = self.skip_bad or bool(then.get("skip_bad"))
        try:
            return WriteConfig(**(then | now | {"resume": False}))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"run.json's settings can't be read ({error}).") from error


def _config_of(run: dict[str, Any]) -> dict[str, Any]:
    config = run.get("config", {})
    if not isinstance(config, dict):
        raise ConfigError(f"run.json's settings can't be read: they are {config!r:.40}.")
    return config
