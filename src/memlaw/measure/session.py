"""Measure what is there: audit any adapter, ask for a recitation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import read_certificate
from memlaw.core.errors import AdapterError, ConfigError, DataError
from memlaw.core.files import RUN_FILE
from memlaw.core.observer import Observer
from memlaw.data.encoding import encode, encode_prompt, end_of_turn_id, resolve_prompt_format
from memlaw.data.readers import RECITE_PROMPT
from memlaw.data.reading import read_records
from memlaw.data.texts import sha256_of, unseen_text
from memlaw.measure.damage import Damage, measure_damage, windows
from memlaw.measure.recall import Audit, audit_examples, decoded_text, greedy_decode
from memlaw.model.base import BaseModel, load_model
from memlaw.model.formats import adapter_base, loaded_adapter, read_object
from memlaw.settings.audit import AuditConfig
from memlaw.settings.choices import EMBEDDED, DType
from memlaw.settings.given import settled

_ASK_MAX_TOKENS = 512


def audit(
    data: Any,
    config: AuditConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> Audit:
    """Measure what an adapter, or a bare base model, recalls of some records.

    Args:
        data: records: a path, or Python objects; see `read_records`.
        config: the settings; or give them by name.
        observer: is told of progress.
        **settings: fields of `AuditConfig`, instead of `config`.

    Returns:
        A verdict a record and a row a token.

    Raises:
        MemlawError: a child that says what was wrong with data, adapter, model or settings.
    """
    config = settled(AuditConfig, config, settings)
    observer = observer or Observer()
    session = Session(config, observer)
    session.require_own_base()
    return session.audit(data)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        text: exactly what was decoded, without the end-of-turn token.
        finished: the model ended its turn within the limit.
    """

    text: str
    finished: bool


def ask(
    adapter: str | Path,
    prompt: str | None = None,
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    observer: Observer | None = None,
) -> Answer:
    """Ask an adapted model, and decode greedily until it ends its turn.

    Args:
        adapter: a folder that `write` or PEFT wrote.
        prompt: what to ask; None is the prompt that a plain text is recited on.
        model: the base model, if it isn't the adapter's own.
        max_tokens: limit (default: the longest certified record's length, else 512).
        observer: is told of progress.

    Raises:
        MemlawError: as for `audit`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be 1 or more.")
    config = AuditConfig(adapter=Path(adapter), model=model)
    session = Session(config, observer or Observer())
    session.require_own_base()
    run_config = session.run.get("config", {})
    prompt = prompt if prompt is not None else run_config.get("recite_prompt", RECITE_PROMPT)
    tokenizer, format = session.base.tokenizer, session.prompt_format
    certificate = Path(adapter) / "certificate.json"
    if max_tokens is None and certificate.is_file():
        max_tokens = max(r.n_tokens for r in read_certificate(certificate).records)
    if not prompt.strip():
        raise DataError("the prompt is empty. Ask something.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise DataError("the prompt holds half a surrogate pair. Give it as UTF-8.")
    end = end_of_turn_id(tokenizer, format)
    with session.model() as adapted:
        (ids,) = greedy_decode(
            adapted,
            [encode_prompt(tokenizer, prompt, format)],
            end_id=end,
            max_tokens=[max_tokens or _ASK_MAX_TOKENS],
        )
    finished = bool(ids) and ids[-1] == end
    text = decoded_text(tokenizer, ids[:-1] if finished else ids)
    return Answer(text=text, finished=finished)


class Session:
    """A base model and, if one is named, the adapter and what its run left on record."""

    def __init__(
        self, config: AuditConfig, observer: Observer, default_model: str | None = None
    ) -> None:
        self.config, self.observer = config, observer
        self.run = _run_record(config.adapter)
        self.adapter_base = _adapter_base(config.adapter, self.run)
        dtype: DType = config.dtype if config.dtype != "auto" else self.run.get("dtype", "auto")
        self.base: BaseModel = load_model(
            config.model or self._own_model() or default_model or EMBEDDED,
            dtype=dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            notice=observer.notice,
        )
        asked = config.prompt_format
        self.prompt_format = resolve_prompt_format(
            self.base.tokenizer, asked if asked != "auto" else self.run.get("prompt_format", "auto")
        )

    def _own_model(self) -> str | None:
        """The base model that the adapter's folder names."""
        if self.run:
            base = self.run["base"]
            return EMBEDDED if base["spec"] == EMBEDDED else str(base["path"])
        if self.config.adapter is None:
            return None
        return adapter_base(self.config.adapter).path

    def require_own_base(self) -> None:
        """Raise AdapterError if the adapter is known to be made for another base model."""
        if self.adapter_base not in (None, self.base.sha256):
            raise AdapterError(
                f"{self.config.adapter} was trained on another base model: its weights' hash is "
                f"{str(self.adapter_base)[:12]}…, that of {self.base.spec} is "
                f"{self.base.sha256[:12]}…. Name the right one with --model."
            )

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The model with the adapter, or the bare one."""
        if self.config.adapter is None:
            yield self.base.model
            return
        with loaded_adapter(self.config.adapter, self.base.model) as adapted:
            yield adapted

    def damage_again(self, claim: dict[str, Any]) -> Damage | None:
        """Damage on the same text as a certificate's; None if that text isn't here."""
        text, name = unseen_text()
        if sha256_of(text) != claim["text_sha256"]:
            path = Path(str(claim["text"]))
            if "\0" in str(path) or not path.is_file():
                return None
            try:
                text, name = unseen_text(path)
            except DataError:
                return None
        if sha256_of(text) != claim["text_sha256"]:
            return None
        tokens = windows(self.base.tokenizer, text, context=self.base.context_length)
        return measure_damage(self.base.model, self.model, tokens, text_name=name, text=text)

    def audit(self, data: Any) -> Audit:
        config, run_config = self.config, self.run.get("config", {})

        def settled(name: str, otherwise: Any) -> Any:
            given = getattr(config, name)
            return given if given is not None else run_config.get(name, otherwise)

        threshold, margin = settled("threshold", 0.5), settled("margin", 0.05)
        if not threshold + margin < 1:
            raise ConfigError(
                f"threshold {threshold:g} and margin {margin:g} ask for p ≥ "
                f"{threshold + margin:g}, which no token can have. Lower one of them."
            )
        records = read_records(
            data,
            prompt_field=settled("prompt_field", None),
            completion_field=settled("completion_field", None),
            format=config.data_format,
            recite_prompt=settled("recite_prompt", RECITE_PROMPT),
            notice=self.observer.notice,
        )
        examples = encode(
            records,
            self.base.tokenizer,
            format=self.prompt_format,
            max_tokens=self.base.context_length,
        )
        with self.model() as adapted:
            return audit_examples(
                adapted,
                self.base.tokenizer,
                examples,
                threshold=threshold,
                margin=margin,
                batch_size=config.batch_size,
                decode=config.decode,
                progress=self.observer.progress,
            )


def _run_record(adapter: Path | None) -> dict[str, Any]:
    """What `write` left beside an adapter; empty for other adapters."""
    if adapter is None:
        return {}
    if not adapter.is_dir():
        raise AdapterError(f"{adapter} is not a folder. Name the folder that holds the adapter.")
    if not (adapter / RUN_FILE).is_file():
        return {}
    run = read_object(adapter / RUN_FILE)
    base = run.get("base")
    if not isinstance(base, dict) or not {"spec", "path", "sha256"} <= set(base):
        raise AdapterError(
            f"{adapter / RUN_FILE} was not written by memlaw: it names no base model. Move it "
            "out of the adapter's folder, and name the base with --model."
        )
    return run


def _adapter_base(adapter: Path | None, run: dict[str, Any]) -> str | None:
    """Hash of the base weights that the adapter was trained on, where that is on record."""
    if run:
        return str(run["base"]["sha256"])
    return adapter_base(adapter).sha256 if adapter is not None else None
