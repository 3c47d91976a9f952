"""What a report shows of a write folder or an audit, and the numbers that page and tables share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memlaw.measure.files import SavedAudit
from memlaw.train.snapshots import Snapshots


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A write folder or an audit.

    Attributes:
        name: what the page calls it.
        recall: the audit: verdicts and token table.
        snapshots: p as training saw it, epoch by epoch; None where none was kept.
        certificate, run, answers: the content of `certificate.json`, `run.json` and
            `answers.json`; None without one.
        earlier: what each generation that is kept recites, the present one's included, by number.
    """

    name: str
    recall: SavedAudit
    snapshots: Snapshots | None = field(default=None, repr=False)
    certificate: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    answers: dict[str, Any] | None = field(default=None, repr=False)
    earlier: Mapping[int, Mapping[str, str]] = field(default_factory=dict, repr=False)


def config_of(view: RunView) -> Mapping[str, Any]:
    """The settings of `write` that are on record in `run.json`; empty where none are."""
    config = (view.run or {}).get("config")
    return config if isinstance(config, Mapping) else {}


def damage_of(view: RunView) -> Mapping[str, Any] | None:
    """The damage that is on record in `run.json` or else in the certificate; None: not on record.

    Its keys are the fields of `memlaw.measure.damage.Damage`.
    """
    found = (view.run or {}).get("results", {}).get("damage") or (view.certificate or {}).get(
        "damage"
    )
    return found or None


def specificity_of(view: RunView) -> tuple[bool, list[str]] | None:
    """The certificate's verdict on other prompts, and what speaks against it; None: it has none."""
    certificate = view.certificate or {}
    if not isinstance(specific := certificate.get("specific"), bool):
        return None
    return specific, [str(reason) for reason in certificate.get("not_specific_because", [])]


def other_harms(view: RunView) -> dict[str, Mapping[str, Any]]:
    """What the certificate says of kinds of harm besides damage, by name."""
    return dict((view.certificate or {}).get("harms", {}))
