"""Tables: what a figure can't say, in rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memlaw.core.criterion import of_thousand
from memlaw.report.probe_view import ProbeView
from memlaw.report.run_view import RunView, damage_of

_WORST = 8
_EXCERPT = 240


@dataclass(frozen=True, kw_only=True)
class Table:
    """A small table.

    Attributes:
        name: of its file, without a suffix.
        title: what it shows.
        head: names of the columns.
        rows: what stands in them, as text.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """As a Markdown table; text that would end a cell is escaped."""
        lines = [_line(self.head), _line(["---"] * len(self.head)), *map(_line, self.rows)]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    said = (" ".join(c.split()).replace("\\", "\\\\").replace("|", "\\|") for c in cells)
    return f"| {' | '.join(c.replace('<', '&lt;') for c in said)} |"


def run_tables(view: RunView) -> list[Table]:
    """Those of a write folder or an audit."""
    found = [summary(view), weakest(view)]
    if damage := damage_table(view):
        found.append(damage)
    if worst := suffered(view):
        found.append(worst)
    return found


def probe_tables(view: ProbeView) -> list[Table]:
    """Those of a probe."""
    found = [cells_table(view)]
    if law := view.law:
        found.append(
            Table(
                name="law",
                title="Parameters",
                head=("parameter", "value", "95 % from", "to"),
                rows=[
                    (p.name, number(p.value), number(p.low), number(p.high)) for p in law.parameters
                ],
            )
        )
        if law.comparison:
            head = tuple(law.comparison[0])
            rows = [tuple(number(row.get(key)) for key in head) for row in law.comparison]
            found.append(Table(name="forms", title="Forms compared", head=head, rows=rows))
    return found


def laws_table(views: Sequence[ProbeView]) -> Table | None:
    """The laws of several probes side by side; None where there are fewer than two."""
    laws = [(view.name, view.law) for view in views if view.law is not None]
    if len(laws) < 2:
        return None
    names = [parameter.name for parameter in laws[0][1].parameters]
    return Table(
        name="laws",
        title="Laws side by side",
        head=("cells", *names, "R²"),
        rows=[
            (
                name,
                *(
                    f"{number(p.value)} ({number(p.low)} to {number(p.high)})"
                    for p in law.parameters
                ),
                number(law.r2),
            )
            for name, law in laws
        ],
    )


def number(value: Any) -> str:
    """A number in few digits, text as it is, and a dash for what isn't there."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return str(value)


def signed(value: float, digits: int = 4) -> str:
    """As `+0.0042`, with so many digits behind the point."""
    return f"{value:+.{digits}f}".replace("-", "−")


def summary(view: RunView) -> Table:
    """The figures that matter."""
    recall = view.recall
    n = len(recall.records)
    rows = [("records", f"{n:,} ({len(recall.tokens):,} target tokens)")]
    if recall.n_decoded == n and recall.end:
        rows.append(("certified", f"{recall.n_certified:,} of {n:,}"))
    if recall.prefix_tokens is not None:
        share, low, high = recall.share_recalled
        of = f"{share:.1%} (95 %: {low:.1%} to {high:.1%})"
        rows.append((f"extracted from {recall.prefix_tokens} tokens", of))
    rows += [
        ("recited word for word", f"{recall.n_recalled:,} of {n:,}"),
        (f"tokens under p {recall.criterion.line:g}", f"{recall.n_under:,}"),
        ("lowest p", f"{recall.tokens.p.min():.3f}"),
    ]
    if rounding := recall.rounding():
        said = f"{of_thousand(rounding['flips_per_1000'])} of 1,000 answers"
        rows.append(("expected to be others in other batches", said))
    if recall.dtype:
        rows.append(("computed in", recall.dtype))
    if run := view.run:
        results = run["results"]
        rows += [
            (
                "adapter",
                f"rank {run['adapter']['rank']}, {run['adapter']['n_parameters']:,} parameters",
            ),
            (
                "bits stored",
                f"{results['bits_stored']:,.0f} ({results['bits_per_parameter']:.3f} a parameter)",
            ),
            ("epochs", f"{run['epochs']:,} ({run['stopped_because']})"),
            ("time", f"{run['timings']['wall_s']:,.0f} s"),
        ]
    return Table(name="summary", title="At a glance", head=("", ""), rows=rows)


def weakest(view: RunView) -> Table:
    """The records with the least probable tokens."""
    recall, p, correct = view.recall, view.recall.tokens.p, view.recall.tokens.correct
    low = [record.min_p for record in recall.records]
    rows = []
    for i in np.argsort(low, kind="stable")[:_WORST].tolist():
        own = recall.token_rows(i)
        at = own.start + int(p[own].argmin())
        rows.append(
            (
                recall.records[i].id,
                recall.titles[i][:60],
                f"{low[i]:.3f}",
                repr(recall.token[at]),
                "itself" if correct[at] else repr(recall.argmax[at]),
            )
        )
    return Table(
        name="weakest",
        title="Weakest records",
        head=("record", "prompt", "lowest p", "of", "the model says"),
        rows=rows,
    )


def damage_table(view: RunView) -> Table | None:
    """ΔNLL and KL with their intervals."""
    damage = damage_of(view)
    if damage is None:
        return None
    return Table(
        name="damage",
        title="Change on unseen text",
        head=("nats a token", "mean", "95 % from", "to"),
        rows=[
            ("ΔNLL", *map(signed, (damage["delta_nll_nats"], *damage["delta_nll_ci95"]))),
            ("KL", *map(signed, (damage["kl_nats"], *damage["kl_ci95"]))),
        ],
    )


def harm_table(name: str, harm: Mapping[str, Any]) -> Table:
    """What was measured of a kind of harm that has no table of its own: its figures, by name."""
    plain = {key: value for key, value in harm.items() if isinstance(value, int | float | str)}
    rows = [(key.replace("_", " "), number(value)) for key, value in plain.items()]
    return Table(name=name, title=f"Harm: {name}", head=("", ""), rows=rows)


def suffered(view: RunView) -> Table | None:
    """The unseen texts whose probability fell most."""
    windows = (view.run or {}).get("results", {}).get("damage_by_window")
    if not windows:
        return None
    worst = sorted(windows, key=lambda w: -w["delta_nll_nats"])[:_WORST]
    return Table(
        name="suffered",
        title="Texts that suffered most",
        head=("ΔNLL", "KL", "text"),
        rows=[
            (signed(w["delta_nll_nats"]), signed(w["kl_nats"]), shortened(w["text"])) for w in worst
        ],
    )


def shortened(text: str, most: int = _EXCERPT) -> str:
    """A text on one line, cut where it is longer than so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} …"


def cells_table(view: ProbeView) -> Table:
    """Every cell of a probe."""
    head = ("rank", "n_tokens", "seed", "nll", "delta_nll", "recall", "certified", "saturated")
    said = ("rank", "tokens", "seed", "loss", "ΔL", "recall", "certified", "censored")
    order = sorted(view.cells, key=lambda c: (c["rank"], c["n_tokens"], c.get("seed", 0)))
    return Table(
        name="cells",
        title="Cells",
        head=said,
        rows=[tuple(number(cell.get(key)) for key in head) for cell in order],
    )
