"""Certify an adapter that somebody else trained, as it lies in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, make_certificate
from memlaw.core.commitment import kept_key
from memlaw.core.errors import ConfigError
from memlaw.core.files import CERTIFICATE_FILE, write_json
from memlaw.core.observer import Observer
from memlaw.data.encoding import end_of_turn_id
from memlaw.measure.decode import decoded_text
from memlaw.measure.harm import kinds_to_measure
from memlaw.measure.session import Session
from memlaw.model.formats import adapter_sha256, n_parameters
from memlaw.model.provenance import versions
from memlaw.settings.audit import AuditConfig
from memlaw.settings.given import settled


def certify_adapter(
    adapter: str | Path,
    data: Any,
    config: AuditConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> Certificate:
    """Audit an adapter as a user will have it, measure its harm, and write `certificate.json`.

    The base model is loaded anew, and the adapter from its folder: what trained it is not asked.
    The certificate also is written where not every record is certified; it says so.

    Args:
        adapter: a folder that PEFT or memlaw wrote.
        data: the records it is to recite; see `read_records`.
        config, observer, **settings: as for `audit`. With `specificity` all kinds of harm are
            measured, else ΔNLL on unseen text, and generality where the data has it.

    Raises:
        MemlawError: as for `audit`.
    """
    config = settled(AuditConfig, config, settings)
    if not config.asks_end:
        option = "end=False" if config.prefix_tokens is None else "prefix_tokens"
        raise ConfigError(f"a certificate is about records with their end: leave {option} out.")
    config = dataclasses.replace(config, adapter=Path(adapter), decode="all")
    session = Session(config, observer or Observer())
    session.require_own_base()
    folder = session.config.adapter  # a checkpoint within the one that was named, perhaps
    assert folder is not None
    found = session.audit(data)
    harms = session.harms(data, kinds_to_measure(config.specificity))
    base, ids = session.base, session.invocation_ids
    end = end_of_turn_id(base.tokenizer, session.prompt_format)
    certificate = make_certificate(
        found,
        harms,
        key=kept_key(folder),
        device=base.model.device.type,
        prompt_format=session.prompt_format,
        base_model=base.name,
        base_sha256=base.sha256,
        tokenizer_sha256=base.tokenizer_sha256,
        adapter_sha256=adapter_sha256(folder),
        n_parameters=n_parameters(folder),
        versions=versions(),
        activated=decoded_text(base.tokenizer, ids) if ids else None,
        invocation_ids=ids,
        rendering=session.settled.to_json() if session.settled else {},
        end=(end, decoded_text(base.tokenizer, [end])),
    )
    write_json(folder / CERTIFICATE_FILE, certificate.to_json())
    return certificate
