"""What the command line shows: progress on standard error, results on standard output."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from memlaw.certify.check import CertificateCheck
from memlaw.cli.terminal import Progress, duration, print_rows
from memlaw.core.observer import EpochStats, Observer
from memlaw.measure.recall import Audit, decoded_text
from memlaw.train.speed import Speed
from memlaw.writer.result import WriteResult

_SHOWN = 5
_CONTEXT_TOKENS = 8
_COLUMNS = 20
_BARS = "▁▂▃▄▅▆▇█"


class ConsoleObserver(Progress, Observer):
    """Progress of `memlaw write` and `memlaw audit`: one line."""

    def __init__(self) -> None:
        super().__init__()
        self.first_epoch: int | None = None

    def epoch(self, stats: EpochStats, n_records: int, max_epochs: int) -> None:
        now = time.monotonic()
        if self.first_epoch is None:
            self.first_epoch, self.started = stats.epoch - 1, now - stats.wall_s
        pace_s = (now - self.started) / (stats.epoch - self.first_epoch)
        left_s = pace_s * (max_epochs - stats.epoch)
        line = (
            f"epoch {stats.epoch:>4}  certified {stats.n_records_over}/{n_records}  "
            f"tokens under {stats.n_under:>4}  loss {stats.nll_nats:.4f}  rank {stats.rank}  "
            f"{f'left out {stats.n_left_out}  ' if stats.n_left_out else ''}"
            f"{stats.n_tokens_run / stats.wall_s:,.0f} tokens/s  "
            f"{stats.flop / stats.wall_s / 1e9:,.0f} GFLOP/s  "
            f"{duration(now - self.started)}, at most {duration(left_s)} left"
        )
        self.show(line, always=stats.n_under == 0)

    def progress(self, what: str, done: int, total: int) -> None:
        self.show(f"{what} {done}/{total} records")


def show_write(result: WriteResult) -> None:
    """The closing table of `memlaw write`."""
    audit, damage = result.audit, result.damage
    low, high = damage.delta_nll_ci95
    rows = _audit_rows(audit) | {
        "bits stored": f"{result.bits_stored:,.0f}",
        "parameters": f"{result.n_parameters:,} (rank {result.rank})",
        "bits per parameter": f"{result.bits_per_parameter:.3f}",
        "ΔNLL on unseen text": f"{damage.delta_nll_nats:+.3f} nats a token "
        f"(95 %: {low:+.3f} to {high:+.3f})",
        "epochs": f"{result.epochs} ({result.stopped_because})",
        "time": duration(result.wall_s),
        "speed": _speed(result.speed, audit.dtype),
        "folder": str(result.out),
    }
    console = _stdout()
    print_rows(console, rows)
    _print_failures(console, audit)
    console.print(Text("CERTIFIED" if result.certified else "NOT CERTIFIED", style="bold"))
    if not result.harmless:
        console.print(
            f"BUT NOT HARMLESS: ΔNLL may be {high:+.4f}, above --max-damage {result.max_damage:g}"
        )
    if not (result.certified and result.harmless):
        if result.n_left_out:
            console.print(
                f"{result.n_left_out} record(s) were left out at the end: too far from complete "
                "for the time that was left."
            )
        console.print("Go on with more epochs (--resume --max-epochs N) or a higher --rank.")


def _speed(speed: Speed | None, dtype: str) -> str:
    if speed is None:
        return "no epoch trained"
    return (
        f"{speed.tokens_per_s:,.0f} tokens/s, {speed.flop_per_s / 1e9:,.0f} GFLOP/s: "
        f"{speed.share_of_peak:.0%} of this machine's {speed.peak_flop_per_s / 1e9:,.0f} in "
        f"{dtype} matrix products"
    )


def show_audit(audit: Audit) -> None:
    """The table of `memlaw audit`."""
    console = _stdout()
    print_rows(
        console,
        _audit_rows(audit)
        | {"NLL": f"{audit.nll_nats:.4f} nats a token", "computed in": audit.dtype},
    )
    _print_failures(console, audit)
    if audit.disagreements:
        console.print(
            f"The witnesses disagree on {len(audit.disagreements)} record(s): rounding "
            "decides there, and may decide otherwise elsewhere:"
        )
        for verdict in audit.disagreements[:_SHOWN]:
            said = "right" if verdict.argmax_recalled else "wrong"
            other = "wrong" if verdict.argmax_recalled else "right"
            console.print(Text(f"  {verdict.id}: forward pass {said}, decoding {other}"))


def show_check(check: CertificateCheck) -> None:
    """The result of `memlaw audit --certificate`."""
    show_audit(check.audit)
    console = _stdout()
    if check.damage is None:
        said = "not measured again: the certificate's text isn't here"
    else:
        low, high = check.certificate.damage["delta_nll_ci95"]
        said = (
            f"{check.damage.delta_nll_nats:+.4f} nats a token "
            f"(certificate, 95 %: {low:+.4f} to {high:+.4f})"
        )
    print_rows(console, {"ΔNLL on unseen text": said})
    for line in check.mismatches[: 4 * _SHOWN]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(check.mismatches) > 4 * _SHOWN:
        console.print(f"  and {len(check.mismatches) - 4 * _SHOWN} more")
    if check.holds:
        verdict = "THE CERTIFICATE HOLDS"
    elif check.mismatches:
        verdict = f"THE CERTIFICATE DOES NOT HOLD: {len(check.mismatches)} mismatch(es)"
    else:
        verdict = (
            f"THE CERTIFICATE IS TRUE, BUT ONLY {check.certificate.n_certified} OF "
            f"{check.certificate.n_records} RECORDS ARE CERTIFIED"
        )
    console.print(Text(verdict, style="bold"))


def audit_json(audit: Audit) -> dict[str, Any]:
    """For `memlaw audit --json`: totals, a record each, and its tokens."""
    content = audit.summary()
    for i, record in enumerate(content["records"]):
        record["tokens"] = _tokens_json(audit, audit.token_rows(i))
    return content


def _tokens_json(audit: Audit, rows: slice) -> list[dict[str, Any]]:
    tokens = audit.tokens
    columns = (tokens.token_id, tokens.p, tokens.nll_nats, tokens.argmax_id, tokens.margin_nats)
    return [
        {
            "token": decoded_text(audit.tokenizer, [token]),
            "token_id": token,
            "p": p,
            "nll_nats": nll,
            "argmax": decoded_text(audit.tokenizer, [best]),
            "argmax_id": best,
            "margin_nats": margin,
        }
        for token, p, nll, best, margin in zip(*(c[rows].tolist() for c in columns), strict=True)
    ]


def failure_in_context(audit: Audit, record: int) -> str:
    """A failing record's weakest spot, as `…1006[7]2710, p 0.31, would say '3'`.

    The spot is the first token that isn't the argmax, else the least probable one.
    """
    verdict, rows = audit.records[record], audit.token_rows(record)
    p = audit.tokens.p[rows]
    at = verdict.first_failure if verdict.first_failure is not None else int(p.argmin())
    target = audit.examples[record].target_ids
    before = decoded_text(audit.tokenizer, target[max(0, at - _CONTEXT_TOKENS) : at])
    after = decoded_text(audit.tokenizer, target[at + 1 : at + 1 + _CONTEXT_TOKENS])
    rival = int(audit.tokens.argmax_id[rows][at])
    says = (
        "is the argmax"
        if rival == target[at]
        else f"would say {decoded_text(audit.tokenizer, [rival])!r}"
    )
    spot = f"{before}[{decoded_text(audit.tokenizer, [target[at]])}]{after}".replace("\n", "⏎")
    return f"{'…' if at > _CONTEXT_TOKENS else ''}{spot}, p {p[at]:.3f}, {says}"


def _audit_rows(audit: Audit) -> dict[str, str]:
    n = len(audit.records)
    under = sum(r.n_under for r in audit.records)
    rows = {"records": f"{n:,} ({len(audit.tokens.token_id):,} target tokens)"}
    if audit.n_decoded == n:
        rows["certified"] = f"{audit.n_certified:,} of {n:,}"
    witness = "forward pass" if not audit.n_decoded else f"{audit.n_decoded:,} decoded"
    rows["recited word for word"] = f"{audit.n_recalled:,} of {n:,} ({witness})"
    rows[f"tokens under p {audit.threshold + audit.margin:g}"] = (
        f"{under:,} (lowest p {min(r.min_p for r in audit.records):.3f})"
    )
    if under or audit.n_recalled < n:
        rows |= _where_it_breaks(audit)
    return rows


def _where_it_breaks(audit: Audit) -> dict[str, str]:
    """Two small plots: of the tokens' p, and of where in their records the first failures are."""
    line = round(_COLUMNS * (audit.threshold + audit.margin))
    counts = np.histogram(audit.tokens.p, bins=_COLUMNS, range=(0, 1))[0]
    bars = _bars(counts)
    rows = {"p of the tokens": f"0 {bars[:line]}│{bars[line:]} 1"}
    places = [
        r.first_failure / max(1, r.n_tokens - 1)
        for r in audit.records
        if r.first_failure is not None
    ]
    if places:
        counts = np.histogram(places, bins=_COLUMNS, range=(0, 1))[0]
        rows["first failures at"] = f"start {_bars(counts)} end"
    return rows


def _bars(counts: np.ndarray) -> str:
    """A bar a count, by its square root, so that single ones show; `·` for none."""
    heights = np.ceil(np.sqrt(counts / max(1, counts.max())) * len(_BARS)).astype(int)
    return "".join(_BARS[h - 1] if h else "·" for h in heights)


def _print_failures(console: Console, audit: Audit) -> None:
    failing = [i for i, r in enumerate(audit.records) if r.n_under or r.decoded_recalled is False]
    if not failing:
        return
    console.print("first failures")
    for i in failing[:_SHOWN]:
        verdict = audit.records[i]
        title = audit.examples[i].record.title
        cascade = f", {verdict.cascade_tokens} tokens lost" if verdict.cascade_tokens else ""
        spot = failure_in_context(audit, i)
        console.print(Text(f"  {verdict.id} '{title[:30]}': {spot}{cascade}"), soft_wrap=True)
    if len(failing) > _SHOWN:
        console.print(f"  and {len(failing) - _SHOWN} more")


def _stdout() -> Console:
    return Console(highlight=False)
