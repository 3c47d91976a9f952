"""The certificate: what was found to be recalled, of what, by what, under which conditions.

It holds hashes and verdicts, no text of the records, and no hash by which a guess of one could be
tried: records are named by salted commitments. Nothing in it has to be believed:
`check_certificate` measures every verdict and hash again, and the damage where its text is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from memlaw.core.commitment import commitment
from memlaw.core.criterion import of_thousand
from memlaw.core.errors import CertificateError
from memlaw.core.files import CERTIFICATE_FILE as CERTIFICATE_FILE
from memlaw.core.files import json_sha256
from memlaw.measure.examine import Audit
from memlaw.measure.harm import KINDS, Harm
from memlaw.measure.specificity import Specificity, specificity

FORMAT = 2
_PLAIN = 1  # its records are named by their bare hashes
_ALLOWED = {
    "dtype": ("float32", "bfloat16", "float16"),
    "prompt_format": ("chat", "plain"),
    "prompt_rendering": (None, "conversation", "generation"),
}
_RENDERING = ("prompt_rendering", "template_args", "clock")


@dataclass(frozen=True, kw_only=True)
class CertifiedRecord:
    """One record's line: identity and verdict.

    The identity is a salted commitment to prompt and completion (`memlaw.core.commitment`); in
    certificates of format 1 their bare hash. One of the two is None.
    """

    id: str
    commitment: str | None = None
    sha256: str | None = None
    certified: bool
    recalled: bool
    min_p: float
    n_tokens: int

    @property
    def name(self) -> str:
        """The identity, whichever of the two."""
        return self.commitment or self.sha256 or ""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `certificate.json` says.

    Attributes:
        statement: it all in a sentence.
        certified: every record is certified.
        n_records, n_certified: how many.
        threshold, margin: every token of a certified record has p ≥ threshold + margin.
        dtype: what the model computed in when it was measured; the guarantee is for this dtype.
        device: the kind of device it was measured on.
        batch_size: records a forward pass, at most, when it was measured.
        prompt_format: `chat` (the tokenizer's template) or `plain`.
        base_model: what plain Transformers loads the base model by.
        base_sha256, tokenizer_sha256, adapter_sha256: hashes.
        records_sha256: hash of the records' identities, see `CertifiedRecord`.
        n_parameters: trained numbers in the adapter.
        damage: change on unseen text.
        records: a line a record.
        versions: of this package and of what it computed with.
        created: when, in UTC, ISO 8601.
        format: of this file.
        harms: what is claimed of other kinds of harm, by name; see `memlaw.measure.harm`.
        specific: other prompts are answered as before; None: they were not measured.
        not_specific_because: a sentence for each thing that was found against that.
        activated: the text in a prompt from which on the adapter is active; None: always.
        invocation_ids: its token ids, as in `alora_invocation_tokens`; None likewise.
        prompt_rendering: `conversation`: prompts are what the chat template renders for the whole
            conversation up to the answer; `generation`: its generation prompt. None: the same.
        template_args: arguments of the chat template by name; None: none.
        rounding: `sd_nats`, the standard deviation of a token's margin over ways through the model;
            `flips_per_1000`, so many of a thousand answers are expected to be others in other
            batches. None: not on record.
        clock: the time that the template was told, ISO 8601; None: it doesn't ask.
        tokenizer: the folder or hub id that the tokenizer was taken from; None: the base model's.
        end_token, end_token_id: the token that ends an answer; None: not on record.
        adapters: of records that are spread over several adapters, the hash of each by its name;
            `adapter_sha256` is that of this table. None: there is one adapter.
    """

    statement: str
    certified: bool
    n_records: int
    n_certified: int
    threshold: float
    margin: float
    dtype: str
    device: str
    batch_size: int
    prompt_format: str
    base_model: str
    base_sha256: str
    tokenizer_sha256: str
    adapter_sha256: str
    records_sha256: str
    n_parameters: int
    damage: dict[str, Any]
    records: tuple[CertifiedRecord, ...]
    versions: dict[str, str]
    created: str
    format: int = FORMAT
    harms: dict[str, dict[str, Any]] = field(default_factory=dict)
    specific: bool | None = None
    not_specific_because: tuple[str, ...] = ()
    activated: str | None = None
    invocation_ids: tuple[int, ...] | None = None
    prompt_rendering: str | None = None
    template_args: dict[str, Any] | None = None
    clock: str | None = None
    tokenizer: str | None = None
    end_token: str | None = None
    end_token_id: int | None = None
    adapters: dict[str, str] | None = None
    rounding: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """For `certificate.json`; what there is nothing to say of is left out."""
        spared = {"harms", "activated", "invocation_ids", *_RENDERING}
        spared |= {"tokenizer", "end_token", "adapters", "rounding"}
        absent = {name for name in spared if not getattr(self, name)}
        if self.end_token_id is None:
            absent.add("end_token_id")
        if self.specific is None:
            absent |= {"specific", "not_specific_because"}
        content = {k: v for k, v in asdict(self).items() if k not in absent}
        content["records"] = [
            {k: v for k, v in line.items() if v is not None} for line in content["records"]
        ]
        return content

    @property
    def is_salted(self) -> bool:
        """Records are named by commitments, which only the key's holder can compute again."""
        return self.format != _PLAIN

    def claims(self) -> dict[str, dict[str, Any]]:
        """What it says of each kind of harm."""
        return {"damage": self.damage, **self.harms}


def make_certificate(
    audit: Audit,
    harms: Mapping[str, Harm],
    *,
    key: bytes,
    device: str,
    prompt_format: str,
    base_model: str,
    base_sha256: str,
    tokenizer_sha256: str,
    adapter_sha256: str,
    n_parameters: int,
    versions: dict[str, str],
    activated: str | None = None,
    invocation_ids: Sequence[int] | None = None,
    rendering: Mapping[str, Any] = MappingProxyType({}),
    end: tuple[int, str] | None = None,
    tokenizer: str | None = None,
) -> Certificate:
    """Put an audit with all records decoded, and the harm of each kind, into a certificate.

    `key` is that of the records' commitments, see `memlaw.core.commitment`;
    `rendering` is what isn't as usual of how prompts are rendered, by the certificate's fields;
    `end` is id and text of the token that ends an answer; `tokenizer` names one that isn't the base
    model's.
    """
    n = len(audit.records)
    names = [commitment(key, r.sha256) for r in audit.records]
    found = {name: harm.to_json() for name, harm in harms.items()}
    verdict = specificity(harms)
    statement = (
        f"{audit.n_certified} of {n} records are certified: computed in {audit.dtype}, the "
        f"adapter gives every token of them, the end of turn included, a probability of at least "
        f"{audit.criterion.line:g} given the prompt and the tokens before it, and greedy decoding "
        "from the prompt alone gives exactly the record and stops."
    )
    if activated is not None:
        statement += (
            f" The adapter is active from the text {activated!r} in a prompt on; without that text "
            "the model is the base model."
        )
    rounding = audit.rounding()
    statement += _of_prompts(rendering)
    if tokenizer is not None:
        statement += f" The tokenizer is {tokenizer}, not the base model's; it lies beside it."
    statement += of_rounding(rounding)
    return Certificate(
        statement=statement,
        certified=audit.certified,
        n_records=n,
        n_certified=audit.n_certified,
        threshold=audit.threshold,
        margin=audit.margin,
        dtype=audit.dtype,
        device=device,
        batch_size=audit.batch_size,
        prompt_format=prompt_format,
        base_model=base_model,
        base_sha256=base_sha256,
        tokenizer_sha256=tokenizer_sha256,
        adapter_sha256=adapter_sha256,
        records_sha256=records_sha256(names),
        n_parameters=n_parameters,
        damage=found.pop("damage"),
        harms=found,
        activated=activated,
        invocation_ids=tuple(invocation_ids) if invocation_ids else None,
        **rendering,
        tokenizer=tokenizer,
        end_token_id=end and end[0],
        end_token=end and end[1],
        records=tuple(
            CertifiedRecord(
                id=r.id,
                commitment=name,
                certified=r.certified,
                recalled=r.recalled,
                min_p=round(r.min_p, 6),
                n_tokens=r.n_tokens,
            )
            for name, r in zip(names, audit.records, strict=True)
        ),
        specific=verdict.specific if verdict else None,
        not_specific_because=verdict.reasons if verdict else (),
        rounding=rounding,
        versions=versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _of_prompts(rendering: Mapping[str, Any]) -> str:
    """Which prompts it is for, where that isn't plain."""
    said = {
        "conversation": " Prompts are what the chat template renders for the whole conversation, "
        "up to the answer: its generation prompt alone is another prompt.",
        "generation": " Prompts are what the chat template renders with its generation prompt: in "
        "the whole conversation other text stands before the answer.",
    }.get(rendering.get("prompt_rendering", ""), "")
    if "clock" in rendering:
        said += f" The chat template puts the time into prompts, and was told {rendering['clock']}."
    return said


def of_rounding(found: Mapping[str, Any] | None) -> str:
    """What becomes of it in other batches, in a sentence; nothing where that isn't on record."""
    if found is None:
        return ""
    return (
        " In other batches a token's margin over the next one is rounded otherwise, by a standard "
        f"deviation of {found['sd_nats']:.2g} nats: of 1,000 answers that are right here "
        f"{of_thousand(found['flips_per_1000'])} are expected to be others there."
    )


def records_sha256(names: Sequence[str]) -> str:
    """Hash of a set of records, named by commitments or hashes, whatever their order."""
    return json_sha256(sorted(names))


def _verdict_follows(certificate: Certificate, verdict: Specificity | None) -> bool:
    """Whether a certificate's second verdict is that of its figures.

    Of several adapters each must be specific: one that isn't may not show in figures of all.
    """
    specific, reasons = certificate.specific, list(certificate.not_specific_because)
    if certificate.adapters and specific is False and verdict is not None:
        return bool(reasons)
    return (specific, reasons) == (
        (verdict.specific, list(verdict.reasons)) if verdict else (None, [])
    )


def read_certificate(path: Path) -> Certificate:
    """Read a certificate.

    Raises:
        CertificateError: not there, not one, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] not in (_PLAIN, FORMAT):
            raise CertificateError(
                f"{path}: format {content['format']}, but this version reads {_PLAIN} and {FORMAT}."
            )
        lines = tuple(CertifiedRecord(**line) for line in content.pop("records"))
        ids = content.pop("invocation_ids", None)
        certificate = Certificate(
            **content, records=lines, invocation_ids=None if ids is None else tuple(ids)
        )
        _check_types(certificate)
        if "damage" in certificate.harms:  # it would stand in for what the certificate says
            raise ValueError("it claims damage twice")
        claims = {name: KINDS[name].read(c) for name, c in certificate.claims().items()}
        if not _verdict_follows(certificate, specificity(claims)):
            raise ValueError("its verdict on specificity is not that of its figures")
        for line in lines:
            _check_types(line)
            named, other = line.commitment, line.sha256
            if not certificate.is_salted:
                named, other = other, named
            if not isinstance(named, str) or other is not None:
                raise ValueError(f"{line.id} is not named as format {certificate.format} does it")
        return certificate
    except OSError as error:
        raise CertificateError(f"{path}: can't be read ({error.strerror}).") from error
    except (
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CertificateError(
            f"{path} is not a certificate ({type(error).__name__}: {error}). Name the "
            f"{CERTIFICATE_FILE} that 'memlaw write' made."
        ) from error


def _check_types(content: Certificate | CertifiedRecord) -> None:
    """Raise TypeError or ValueError where a field holds what it can't."""
    number: tuple[type, ...] = (int, float)
    plain = {"str": (str,), "int": (int,), "float": number, "bool": (bool,)}
    for each in fields(content):
        value, kinds = getattr(content, each.name), plain.get(str(each.type))
        if kinds and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            raise TypeError(f"{each.name} is {value!r:.40}")
    if isinstance(content, Certificate):
        for name, allowed in _ALLOWED.items():
            if getattr(content, name) not in allowed:
                raise ValueError(f"{name} is {getattr(content, name)!r:.40}")
        adapters = content.adapters
        if adapters is not None and not (
            isinstance(adapters, dict) and adapters and all(map(_is_text, adapters.values()))
        ):
            raise TypeError(f"adapters are {adapters!r:.40}")
        rounding = content.rounding
        if rounding is not None and not (
            isinstance(rounding, dict)
            and rounding.keys() == {"sd_nats", "flips_per_1000"}
            and all(
                type(value) in (int, float) and 0 <= float(value) < math.inf
                for value in rounding.values()
            )
        ):
            raise TypeError(f"rounding is {rounding!r:.40}")
        arguments, clock = content.template_args, content.clock
        if not isinstance(arguments, dict | None):
            raise TypeError(f"template_args is {arguments!r:.40}")
        if clock is not None:
            datetime.fromisoformat(clock)
        text, ids = content.activated, content.invocation_ids
        if (text is None) != (ids is None) or not (
            ids is None or (isinstance(text, str) and ids and all(type(i) is int for i in ids))
        ):
            raise ValueError(f"activated is {text!r:.40} and invocation_ids are {ids!r:.40}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)
