"""What several commands show: totals, where recall breaks, what is left of removed records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from memlaw.cli.terminal import BARS, print_rows, stdout_console
from memlaw.core.criterion import of_thousand

if TYPE_CHECKING:
    from memlaw.certify.check import CertificateCheck
    from memlaw.measure.examine import Audit
    from memlaw.measure.forgotten import Forgotten
    from memlaw.measure.specificity import Specificity
    from memlaw.shards.checking import ShardsCheck

SHOWN = 5  # records of a kind; of the others only how many there are
_CONTEXT_TOKENS = 8
_COLUMNS = 20


def audit_rows(audit: Audit) -> dict[str, str]:
    """The totals, as rows of a table: name, value."""
    n = len(audit.records)
    rows = {"records": f"{n:,} ({len(audit.tokens.token_id):,} target tokens)"}
    if audit.n_decoded == n and audit.end:
        rows["certified"] = f"{audit.n_certified:,} of {n:,}"
    how = f"{audit.n_decoded:,} decoded" if audit.n_decoded else "teacher-forced pass"
    what = "recited word for word" if audit.end else "text recited"
    if audit.prefix_tokens is not None:
        rows = {
            "documents": f"{n:,}, from {audit.prefix_tokens} tokens of each (of what follows: "
            f"{len(audit.tokens.token_id):,} tokens)"
        }
        what = "extracted"
        share, low, high = audit.share_recalled
        how += f"): {share:.1%} (95 %: {low:.1%} to {high:.1%}"
    rows[what] = f"{audit.n_recalled:,} of {n:,} ({how})"
    rows[f"tokens under p {audit.criterion.line:g}"] = (
        f"{audit.n_under:,} (lowest p {min(r.min_p for r in audit.records):.3f})"
    )
    if rounding := audit.rounding():
        rows["in other batches"] = (
            f"{of_thousand(rounding['flips_per_1000'])} of 1,000 answers expected to be others "
            f"(SD of a margin: {rounding['sd_nats']:.2g} nats)"
        )
    if audit.n_under or audit.n_recalled < n:
        rows |= _where_it_breaks(audit)
    return rows


def _where_it_breaks(audit: Audit) -> dict[str, str]:
    """Two small plots: of the tokens' p, and of where in their records the first failures are."""
    line = round(_COLUMNS * audit.criterion.line)
    shown = bars(np.histogram(audit.tokens.p, bins=_COLUMNS, range=(0, 1))[0])
    rows = {"p of the tokens": f"0 {shown[:line]}│{shown[line:]} 1"}
    places = [
        r.first_failure / max(1, r.n_tokens - 1)
        for r in audit.records
        if r.first_failure is not None
    ]
    if places:
        counts = np.histogram(places, bins=_COLUMNS, range=(0, 1))[0]
        rows["first failures at"] = f"start {bars(counts)} end"
    return rows


def bars(counts: np.ndarray) -> str:
    """A bar a count, by its square root, so that single ones show; `·` for none."""
    heights = np.ceil(np.sqrt(counts / max(1, counts.max())) * len(BARS)).astype(int)
    return "".join(BARS[h - 1] if h else "·" for h in heights)


def print_failures(console: Console, audit: Audit) -> None:
    """The first records that fail, each with its weakest spot. Nothing if none fails."""
    failing = [
        i
        for i, r in enumerate(audit.records)
        if (r.n_under and audit.end) or not r.recalled or r.decoded_recalled is False
    ]
    if not failing:
        return
    console.print("first failures")
    for i in failing[:SHOWN]:
        verdict = audit.records[i]
        title = audit.examples[i].record.title
        cascade = (
            f", {verdict.cascade_tokens} tokens decoded wrong" if verdict.cascade_tokens else ""
        )
        spot = failure_in_context(audit, i)
        console.print(Text(f"  {verdict.id} '{title[:30]}': {spot}{cascade}"), soft_wrap=True)
    if len(failing) > SHOWN:
        console.print(f"  and {len(failing) - SHOWN} more")


def print_specificity(console: Console, verdict: Specificity | None) -> None:
    """The second verdict, and what speaks against it. Nothing if other prompts weren't asked."""
    if verdict is None:
        return
    console.print(Text(verdict.word, style="bold"))
    for reason in verdict.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=True)


def failure_in_context(audit: Audit, record: int) -> str:
    """A failing record's weakest spot, as `…1006[7]2710, p 0.31, would say '3'`.

    The spot is the first token that isn't the argmax, else the least probable one.
    """
    from memlaw.data.pieces import pieces

    verdict, rows = audit.records[record], audit.token_rows(record)
    p = audit.tokens.p[rows]
    at = verdict.first_failure if verdict.first_failure is not None else int(p.argmin())
    example = audit.examples[record]
    shown = pieces(audit.tokenizer, example.prompt_ids, example.target_ids)
    before = "".join(shown[max(0, at - _CONTEXT_TOKENS) : at])
    after = "".join(shown[at + 1 : at + 1 + _CONTEXT_TOKENS])
    rival = audit.piece_instead(record, at, int(audit.tokens.argmax_id[rows][at]))
    says = "is the argmax" if rival is None else f"would say {rival!r}"
    spot = f"{before}[{shown[at]}]{after}".replace("\n", "⏎")
    return f"{'…' if at > _CONTEXT_TOKENS else ''}{spot}, p {p[at]:.3f}, {says}"


def show_forgotten(found: Sequence[Forgotten]) -> None:
    """What is left of removed records, all together."""
    tried = sum(one.n_attempts for one in found)
    drawn = sum(one.n_samples for one in found)
    rows = {
        "forgotten": f"{sum(one.holds for one in found)} of {len(found)}",
        "decoded": f"{sum(one.decoded for one in found)} of {len(found)}",
        "telling tokens too likely": f"{sum(one.n_above for one in found)}"
        f" (highest p {max(one.most_p for one in found):.3f})"
        f"{', never trained on: not counted' if all(one.anew for one in found) else ''}",
        "got by reworded, cut, misspelt": f"{sum(one.n_extracted for one in found)} of {tried}",
        "got by sampling": f"{sum(one.n_sampled for one in found)} of {drawn}",
        "answered as by the bare model": f"{sum(one.as_base for one in found)} of {len(found)}",
    }
    print_rows(stdout_console(), rows)


def certificate_verdict(check: CertificateCheck | ShardsCheck) -> str:
    """In capitals whether a certificate holds."""
    claimed = check.certificate
    if check.holds:
        return "THE CERTIFICATE HOLDS"
    if check.mismatches:
        return f"THE CERTIFICATE DOES NOT HOLD: {len(check.mismatches)} mismatch(es)"
    only = f"ONLY {claimed.n_certified} OF {claimed.n_records} RECORDS ARE CERTIFIED"
    if check.unchecked:
        also = "" if claimed.certified else f"; AND {only}"
        return (
            f"NOTHING SPEAKS AGAINST THE CERTIFICATE, BUT NOT ALL OF IT CAN BE CHECKED HERE{also}"
        )
    return f"THE CERTIFICATE IS TRUE, BUT {only}"
