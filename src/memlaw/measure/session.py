"""Measure what is there: audit any adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memlaw.core.criterion import Criterion
from memlaw.core.errors import AdapterError, ConfigError, ModelError
from memlaw.core.observer import Observer
from memlaw.data.activation import last_start
from memlaw.data.bad_rows import BadRows
from memlaw.data.documents import read_documents, split_documents
from memlaw.data.encoding import encode, end_of_turn_id, resolve_prompt_format
from memlaw.data.readers import RECITE_PROMPT
from memlaw.data.reading import read_records
from memlaw.data.record import Example, Record
from memlaw.data.rendering import parsed_arguments
from memlaw.data.settling import Settled, settle_rendering
from memlaw.data.texts import general_texts
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.decode import decoded_text
from memlaw.measure.examine import Audit, audit_examples
from memlaw.measure.harm import KINDS, Harm, measurements
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel, load_model
from memlaw.model.formats import found_adapter, invocation_ids, loaded_adapter
from memlaw.model.peft_folder import changes_nothing
from memlaw.model.reach import lowest_layer
from memlaw.model.tokenizer import with_tokenizer
from memlaw.model.vocabulary import require_rows
from memlaw.settings.audit import AuditConfig
from memlaw.settings.choices import EMBEDDED, DType
from memlaw.settings.given import settled


def audit(
    data: Any,
    config: AuditConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> Audit:
    """Measure what an adapter, or a bare base model, recalls of some records.

    Args:
        data: the records: a path, or Python objects; see `read_records`.
        config: the settings; or give them by name.
        observer: is told of progress.
        **settings: fields of `AuditConfig`, instead of `config`.

    Returns:
        A verdict on each record and a row for each token.

    Raises:
        MemlawError: data, adapter, model or settings can't be used; its subclass says which.
    """
    config = settled(AuditConfig, config, settings)
    session = Session(config, observer or Observer())
    session.require_own_base()
    return session.audit(data)


def audit_and_harms(
    data: Any,
    config: AuditConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> tuple[Audit, dict[str, Harm]]:
    """As `audit`; and what else an adapter changes: the harm of each kind, by name.

    Args:
        data, config, observer, **settings: as for `audit`.

    Raises:
        MemlawError: as for `audit`; or the file of near misses can't be read.
    """
    config = settled(AuditConfig, config, settings)
    session = Session(config, observer or Observer())
    session.require_own_base()
    return session.audit(data), session.harms(data, list(KINDS))


class Session:
    """A loaded base model and, if one is named, an adapter to measure on it.

    Attributes:
        config: the settings.
        folder: what the adapter's folder has on record.
        base: the loaded base model.
        prompt_format: how prompts become tokens.
        invocation_ids: the tokens from which on the adapter is active; empty: everywhere.
        settled: how prompts are rendered, once records were read.

    Raises:
        MemlawError: adapter or base model can't be read.
    """

    def __init__(
        self,
        config: AuditConfig,
        observer: Observer,
        default_model: str | None = None,
        rendering: Mapping[str, Any] | None = None,
        base: BaseModel | None = None,
        *,
        phrasings_read: bool = False,
    ) -> None:
        if config.adapter is not None:
            adapter, said = found_adapter(config.adapter)
            config = dataclasses.replace(config, adapter=adapter)
            if said:
                observer.notice(said)
        self.config, self.observer = config, observer
        self._examples: list[Example] | None = None
        self._phrasings_read = phrasings_read
        self._rendering = rendering
        self.settled: Settled | None = None
        self.folder = AdapterFolder(config.adapter)
        self.invocation_ids = invocation_ids(config.adapter) if config.adapter else ()
        run = self.folder.run
        dtype: DType = config.dtype if config.dtype != "auto" else run.get("dtype", "auto")
        named = None if config.model else self.folder.base_model
        try:
            base = base or load_model(
                config.model or named or default_model or EMBEDDED,
                dtype=dtype,
                device=config.device,
                trust_remote_code=config.trust_remote_code,
                tokenizer=config.tokenizer,
                spare_tokenizer=config.adapter,
                notice=observer.notice,
            )
        except ModelError as error:
            if named is None:
                raise
            raise AdapterError(
                f"{self.folder.base_is_named_by} names the base model {named!r}, which can't be "
                f"loaded here: {error} Or name the base model with --model."
            ) from error
        self.base = with_tokenizer(base, config.tokenizer, config.adapter, observer.notice)
        format = config.prompt_format
        if config.prefix_tokens is not None:
            format = "plain"
        self.prompt_format = resolve_prompt_format(
            self.base.tokenizer, format if format != "auto" else run.get("prompt_format", "auto")
        )

    def settle(self, records: Sequence[Record], bad: BadRows | None = None) -> None:
        """Render prompts as the settings say, else as they were when the adapter was made."""
        config, tokenizer = self.config, self.base.tokenizer
        known = self._rendering
        if known is None and self.folder.run:
            known = {"prompt_rendering": "generation"} | self.folder.run.get("rendering", {})
        known = known or {}
        arguments = known.get("template_args", {})
        if config.template_args is not None:
            arguments = parsed_arguments(config.template_args, tokenizer)
        self.settled = settle_rendering(
            records,
            tokenizer,
            format=self.prompt_format,
            arguments=arguments,
            clock=known.get("clock"),
            way=config.prompt_rendering or known.get("prompt_rendering"),
            bad=bad,
            notice=(lambda text: None) if known else self.observer.notice,
        )

    def known_rendering(self) -> dict[str, Any]:
        """How prompts are rendered here, as another session takes it; once records were read."""
        if self.settled is None:
            return {}
        rendering = self.settled.rendering
        return {
            "prompt_rendering": rendering.way,
            "template_args": dict(rendering.arguments),
            "clock": rendering.clock,
        }

    def require_own_base(self) -> None:
        """Raise AdapterError if the adapter is known to be made for another base model."""
        trained_on = self.folder.base_sha256
        if trained_on not in (None, self.base.sha256):
            raise AdapterError(
                f"{self.config.adapter} was trained on another base model: its weights' hash is "
                f"{str(trained_on)[:12]}…, that of {self.base.spec} is "
                f"{self.base.sha256[:12]}…. Name the right one with --model."
            )

    def missing(self, prompt_ids: Sequence[int]) -> str | None:
        """The text that an activated adapter looks for, if it isn't in the prompt."""
        ids = self.invocation_ids
        if not ids or last_start(prompt_ids, ids) is not None:
            return None
        text = self.folder.setting("activated", None) or decoded_text(self.base.tokenizer, ids)
        return str(text)

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The model with the adapter, or the bare one."""
        if self.config.adapter is None:
            yield self.base.model
            return
        with loaded_adapter(self.config.adapter, self.base.model) as adapted:
            yield adapted

    def harms(self, data: Any, kinds: Collection[str]) -> dict[str, Harm]:
        """Harm of some kinds, by name.

        Args:
            data: the records.
            kinds: their names.
        """
        subject = self._subject(data)
        return {
            name: measurement.measure(self.base.model, self.model)
            for name, measurement in measurements(subject, kinds).items()
        }

    def harms_again(self, data: Any, claims: Mapping[str, Mapping[str, Any]]) -> dict[str, Harm]:
        """Harm of each kind, on what a certificate measured it on; left out if that isn't here.

        Args:
            data: the records.
            claims: of a certificate.
        """
        subject = self._subject(data)
        found = {name: KINDS[name].of_claim(subject, claim) for name, claim in claims.items()}
        return {
            name: measurement.measure(self.base.model, self.model)
            for name, measurement in found.items()
            if measurement is not None
        }

    def _meant(self, name: str, otherwise: Any) -> Any:
        """A setting; what is left open is taken from the run."""
        given = getattr(self.config, name)
        return given if given is not None else self.folder.setting(name, otherwise)

    def _file_meant(self, name: str) -> str | None:
        """The path of a file; one that the run had only if it is here."""
        given: str | None = getattr(self.config, name)
        if given is None and (of_run := self.folder.setting(name, None)) is not None:
            given = of_run if Path(of_run).is_file() else None
        return given

    def examples(self, data: Any) -> list[Example]:
        """The records as tokens, read once: a session is about one set of them."""
        if self._examples is not None:
            return self._examples
        bad = BadRows()
        if self.config.prefix_tokens is not None:
            self._examples = self._documents(data, self.config.prefix_tokens, bad)
            return self._examples
        records = read_records(
            data,
            prompt_field=self._meant("prompt_field", None),
            completion_field=self._meant("completion_field", None),
            format=self.config.data_format,
            delimiter=self._meant("delimiter", None),
            recite_prompt=self._meant("recite_prompt", RECITE_PROMPT),
            paraphrases=None if self._phrasings_read else self._file_meant("paraphrases"),
            bad=bad,
            notice=self.observer.notice,
        )
        self.settle(records, bad)
        self._examples = encode(
            records,
            self.base.tokenizer,
            format=self.prompt_format,
            max_tokens=self.base.context_length,
            end=self.config.asks_end,
            bad=bad,
        )
        skip = self.config.skip_bad or bool(self.folder.setting("skip_bad", False))
        bad.settle(len(self._examples), skip=skip, notice=self.observer.notice)
        return self._examples

    def _documents(self, data: Any, n_prefix: int, bad: BadRows) -> list[Example]:
        """Documents as tokens, each split after its first `n_prefix`."""
        config, notice = self.config, self.observer.notice
        documents = read_documents(
            data,
            field=config.completion_field,
            format=config.data_format,
            delimiter=self._meant("delimiter", None),
            bad=bad,
            notice=notice,
        )
        examples = split_documents(
            documents,
            self.base.tokenizer,
            n_prefix=n_prefix,
            n_suffix=config.suffix_tokens,
            max_tokens=self.base.context_length,
            bad=bad,
            notice=notice,
        )
        bad.settle(len(examples), skip=config.skip_bad, notice=notice)
        return examples

    def records(self, data: Any) -> list[Record]:
        """The records that `examples` has."""
        return [example.record for example in self.examples(data)]

    @property
    def stops_at(self) -> int | None:
        """The token at which decoding stops where no end is asked for; None: at none."""
        if self.config.asks_end:  # then each target has it
            return None
        try:
            return end_of_turn_id(self.base.tokenizer, self.prompt_format)
        except ModelError:
            return None

    def _subject(self, data: Any) -> Subject:
        adapter = self.config.adapter
        return Subject(
            base=self.base,
            texts=general_texts(),
            records=self.records(data),
            format=self.prompt_format,
            first_layer=lowest_layer(adapter, self.base.model) if adapter else 0,
            near=self._file_meant("near"),
        )

    def audit(self, data: Any) -> Audit:
        """Audit records: see `audit`. What the settings leave open is taken from the run."""
        config, meant = self.config, self._meant
        usual = Criterion()
        needed = Criterion(meant("threshold", usual.threshold), meant("margin", usual.margin))
        if not needed.line < 1:
            raise ConfigError(
                f"threshold {needed.threshold:g} and margin {needed.margin:g} ask for p ≥ "
                f"{needed.line:g}, which no token can have. Lower one of them."
            )
        tokenizer, examples = self.base.tokenizer, self.examples(data)
        with self.model() as adapted:
            inputs = (e.prompt_ids + e.target_ids for e in examples)
            require_rows(adapted, tokenizer, inputs)
            found = audit_examples(
                adapted,
                tokenizer,
                examples,
                end=config.asks_end,
                end_id=self.stops_at,
                prefix_tokens=config.prefix_tokens,
                threshold=needed.threshold,
                margin=needed.margin,
                batch_size=config.batch_size,
                decode=config.decode,
                progress=self.observer.progress,
            )
        if found.tokens.p.size and not (found.tokens.p >= 0).all():  # of NaN nothing is true
            raise ModelError(
                f"{config.adapter or self.base.spec}: p is not a number where it is computed in "
                f"{self.base.dtype}. Weights are damaged, or too large for this dtype: fetch them "
                "again, or give --dtype float32."
            )
        if not found.n_recalled and config.adapter and changes_nothing(config.adapter):
            self.observer.notice(
                f"{config.adapter} changes nothing: B is zero in all of its layers, as before the "
                "first step of a training. These are the bare model's numbers."
            )
        return found
