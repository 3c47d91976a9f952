"""Measure again what a certificate says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, read_certificate
from memlaw.certify.mismatches import mismatches, unchecked
from memlaw.core.commitment import read_key
from memlaw.core.errors import ConfigError
from memlaw.core.observer import Observer
from memlaw.measure.damage import Damage
from memlaw.measure.decode import decoded_text
from memlaw.measure.examine import Audit
from memlaw.measure.harm import KINDS, Harm
from memlaw.measure.session import Session
from memlaw.model.formats import adapter_sha256, n_parameters
from memlaw.settings.audit import AuditConfig
from memlaw.settings.given import settled


@dataclass(frozen=True, kw_only=True)
class CertificateCheck:
    """What became of a certificate that was measured again.

    Attributes:
        certificate: the claim.
        audit: the new measurement.
        harms: measured anew, by kind; those whose text isn't here are left out. With `specificity`
            also kinds that the certificate says nothing of.
        mismatches: a sentence for each thing that doesn't match; empty if the certificate holds.
        unchecked: a sentence for each thing that can't be checked here: harm on a text or prompts
            that aren't here; which records are certified, without the private file beside the
            certificate.
    """

    certificate: Certificate
    audit: Audit = field(repr=False)
    harms: dict[str, Harm]
    mismatches: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def damage(self) -> Damage | None:
        """Change on unseen text; None where the certificate's text isn't here."""
        return self.harms.get("damage")  # type: ignore[return-value]

    @property
    def holds(self) -> bool:
        """Everything certified was found so again, and nothing else was given."""
        return not self.mismatches and not self.unchecked and self.certificate.certified


def check_certificate(
    path: str | Path,
    data: Any,
    config: AuditConfig | None = None,
    *,
    phrasings_read: bool = False,
    observer: Observer | None = None,
    **settings: Any,
) -> CertificateCheck:
    """Measure again what a certificate says, and name what doesn't match.

    The adapter is the one in the certificate's folder, unless `adapter` names another; dtype,
    threshold and margin are the certificate's; everything is decoded.

    Args:
        path: a `certificate.json`.
        data: the records it is about.
        phrasings_read: they have their further phrasings already: the run's file isn't read again.
        config, observer, **settings: as for `audit`.

    Raises:
        MemlawError: as for `audit`, or the certificate can't be read.
    """
    certificate = read_certificate(Path(path))
    config = settled(AuditConfig, config, settings)
    config = dataclasses.replace(
        config,
        adapter=config.adapter or Path(path).parent,
        dtype=certificate.dtype if config.dtype == "auto" else config.dtype,  # type: ignore[arg-type]
        threshold=certificate.threshold,
        margin=certificate.margin,
        prompt_format=certificate.prompt_format,  # type: ignore[arg-type]
        decode="all",
    )
    key = None
    if certificate.is_salted:  # the key may have stayed with the adapter
        key = read_key(Path(path).parent) or read_key(Path(str(config.adapter)))
    if not config.asks_end:
        option = "--no-end" if config.prefix_tokens is None else "--prefix-tokens"
        raise ConfigError(
            f"a certificate is about records with their end: leave {option} out, or --certificate."
        )
    session = Session(
        config,
        observer or Observer(),
        default_model=certificate.base_model,
        rendering={
            "prompt_rendering": certificate.prompt_rendering or "generation",
            "template_args": certificate.template_args or {},
            "clock": certificate.clock,
        },
        phrasings_read=phrasings_read,
    )
    found = session.audit(data)
    claims = certificate.claims()
    harms = session.harms_again(data, claims)
    if config.specificity:
        harms |= session.harms(data, [name for name in KINDS if name not in claims])
    ids = session.invocation_ids
    return CertificateCheck(
        certificate=certificate,
        audit=found,
        harms=harms,
        mismatches=tuple(
            mismatches(
                certificate,
                found,
                harms,
                base_sha256=session.base.sha256,
                tokenizer_sha256=session.base.tokenizer_sha256,
                adapter_sha256=(
                    adapter_sha256(session.config.adapter) if session.config.adapter else "none"
                ),
                invocation_ids=ids,
                invocation_text=decoded_text(session.base.tokenizer, ids),
                key=key,
                n_parameters=n_parameters(session.config.adapter)
                if session.config.adapter
                else None,
            )
        ),
        unchecked=tuple(unchecked(certificate, harms, key, session.base.model.device.type)),
    )
