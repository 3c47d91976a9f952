"""The survival table: one adapter, audited in every form in which people run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memlaw.core.errors import ConfigError, MemlawError
from memlaw.core.observer import Observer
from memlaw.export.forms import Bench
from memlaw.measure.examine import Audit
from memlaw.measure.session import Session
from memlaw.settings.audit import AuditConfig
from memlaw.settings.forms import FORMS, PLAIN, Form, forms_named
from memlaw.settings.given import settled


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form, and what was found in it.

    Attributes:
        form: what is otherwise than in the plain audit.
        audit: None: it couldn't be tried.
        why_not: why it couldn't.
        named: the user asked for this very form.
    """

    form: Form
    audit: Audit | None = field(repr=False)
    why_not: str = ""
    named: bool = False

    @property
    def passes(self) -> bool:
        """Every record is recited word for word; or it can't be tried, and nobody named it."""
        if self.audit is None:
            return not self.named
        return self.audit.n_recalled == len(self.audit.records)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON; what couldn't be tried has no figures, but `why_not`."""
        told: dict[str, Any] = {"name": self.form.name, "what": self.form.what}
        if self.audit is None:
            return told | {"tried": False, "named": self.named, "why_not": self.why_not}
        records = self.audit.records
        return told | {
            "tried": True,
            "dtype": self.audit.dtype,
            "batch_size": self.audit.batch_size,
            "n_records": len(records),
            "n_certified": self.audit.n_certified,
            "n_recited": self.audit.n_recalled,
            "lowest_p": min(r.min_p for r in records),
            "nll_nats": self.audit.nll_nats,
            "lost": [r.id for r in records if not r.recalled],
        }


@dataclass(frozen=True, kw_only=True)
class Survival:
    """The table; its first row is the plain audit.

    Attributes:
        rows: in the order of `FORMS`.
    """

    rows: tuple[Row, ...]

    @property
    def plain(self) -> Audit:
        """The adapter as it was certified."""
        assert self.rows[0].audit is not None
        return self.rows[0].audit

    @property
    def recites(self) -> bool:
        """Every form recites every record word for word; see `Row.passes` for what wasn't tried."""
        return all(row.passes for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """All rows, and whether all of them pass."""
        return {"recites": self.recites, "rows": [row.to_json() for row in self.rows]}


def survival(
    data: Any,
    config: AuditConfig | None = None,
    *,
    forms: str | Sequence[str] = (),
    observer: Observer | None = None,
    **settings: Any,
) -> Survival:
    """Audit an adapter in each form: see docs/survival.md.

    Args:
        data: the records; see `read_records`.
        config: the settings of the plain audit, with an adapter; or give them by name.
        forms: names of the forms (default: all). One that is named and can't be tried doesn't pass;
            of all, those that can't be tried count for nothing.
        observer: is told of progress.
        **settings: fields of `AuditConfig`, instead of `config`.

    Raises:
        MemlawError: as for `audit`; or there is no adapter, or no form with such a name.
    """
    config, observer = settled(AuditConfig, config, settings), observer or Observer()
    named = forms_named(forms, "forms")
    if config.adapter is None:
        raise ConfigError("survival is an adapter's: name its folder with --adapter.")
    session = Session(config, observer)
    session.require_own_base()
    bench = Bench(session.base, trust_remote_code=config.trust_remote_code)
    plain = session.audit(data)
    rows = [Row(form=PLAIN, audit=plain)]
    for form in named or FORMS.values():
        observer.notice(f"{form.name}: {form.what}.")
        rows.append(_row(form, bench, session, plain, named=bool(named)))
    return Survival(rows=tuple(rows))


def _row(form: Form, bench: Bench, session: Session, plain: Audit, *, named: bool) -> Row:
    config, folder = session.config, session.config.adapter
    assert folder is not None
    try:
        found = bench.audit(
            folder,
            form,
            plain.examples,
            threshold=plain.threshold,
            margin=plain.margin,
            batch_size=config.batch_size,
            decode=config.decode,
            end=plain.end,
            end_id=session.stops_at,
            progress=session.observer.progress,
        )
    except MemlawError as error:
        return Row(form=form, audit=None, why_not=str(error), named=named)
    return Row(form=form, audit=found, named=named)
