"""The settings of `audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import PromptFormat
from memlaw.data.readers import DataFormat
from memlaw.data.rendering import PromptRendering
from memlaw.settings.choices import Decode, DType, check_template_args


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
        delimiter: what is between the cells of a CSV file: one character, or tab (default: the
            run's, else found out from the first line).
        skip_bad: leave out rows that can't be used, and list the first of them; without it, too, if
            the run did.
        prompt_format: chat, plain, or auto: the run's, else chat where there is a template.
        prompt_rendering: conversation or generation, as of write (default: the run's, else
            conversation).
        template_args: arguments of the chat template, as enable_thinking=false (default: the
            run's).
        end: ask for the end-of-turn token, too. Without it a record counts when its text is right,
            whatever p its tokens have and however the answer goes on.
        prefix_tokens: split documents, which have a text and no prompt, after this many tokens, and
            measure the share that a model goes on with word for word; prompts are plain, and no
            end is asked for.
        suffix_tokens: with prefix_tokens: how many of the tokens behind the prefix count, at most
            (default: all).
        recite_prompt: prompt for a plain text file (default: the run's).
        paraphrases: file with other phrasings of the records' prompts, JSONL with prompt and
            paraphrases; one in four of a record's phrasings is held out, and generality measured on
            it (default: the run's).
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
    delimiter: str | None = None
    skip_bad: bool = False
    prompt_format: PromptFormat = "auto"
    prompt_rendering: PromptRendering | None = None
    template_args: tuple[str, ...] | None = None
    end: bool = True
    prefix_tokens: int | None = None
    suffix_tokens: int | None = None
    recite_prompt: str | None = None
    paraphrases: str | None = None
    specificity: bool = False
    near: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        check_template_args(self.template_args)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if isinstance(self.decode, int) and self.decode < 0:
            raise ConfigError(f"decode is {self.decode}; give a count, all or none.")
        if self.threshold is not None and not 0.5 <= self.threshold < 1:
            raise ConfigError(f"threshold {self.threshold:g} is out of range [0.5, 1).")
        if self.margin is not None and not 0 <= self.margin < 1 - (self.threshold or 0.5):
            raise ConfigError(f"margin {self.margin:g} is out of range: threshold + margin < 1.")
        for name in ("prefix_tokens", "suffix_tokens"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise ConfigError(f"{name} is {n}; it must be 1 or more.")
        if self.prefix_tokens is None:
            if self.suffix_tokens is not None:
                raise ConfigError("suffix_tokens needs prefix_tokens: it counts what follows them.")
            return
        of_prompts = (
            *("prompt_field", "recite_prompt", "paraphrases", "near", "specificity"),
            *("template_args", "prompt_rendering"),
        )
        if given := [name for name in of_prompts if getattr(self, name)]:
            raise ConfigError(
                f"{' and '.join(given)}: documents have no prompts of their own where "
                "prefix_tokens splits them. Leave one of the two out."
            )
        if self.prompt_format == "chat":
            raise ConfigError(
                "prefix_tokens continues bare text, and prompt_format chat puts a template around "
                "it. Leave one of the two out."
            )

    @property
    def asks_end(self) -> bool:
        """The end-of-turn token is asked for, too: not where documents are continued."""
        return self.end and self.prefix_tokens is None
