"""Charts of a probe: its cells by rank and length, and the law that was fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from memlaw.law.rows import CellRow
from memlaw.report.charts import HEIGHT, INK, LEGEND, ORDER, WIDTH, Figure, data, spec
from memlaw.report.probe_view import LawView, ProbeView

_SAID = {"nll": "loss, nats", "recall": "recall"}
_NAMES = {"rank": "rank", "n_tokens": "tokens"}


def delta_loss(cells: Sequence[CellRow], law: LawView | None, *, x: str, by: str) -> Any:
    """ΔL over `x`, a line for each `by`; censored cells hollow; lines of the fit, if given."""
    values = sorted({cell[x] for cell in cells})
    groups = sorted({cell[by] for cell in cells})
    scale = alt.Scale(type="log", nice=False, padding=12)
    encoding = {
        "x": alt.X(f"{x}:Q", title=_NAMES[x], scale=scale, axis=alt.Axis(values=values, grid=True)),
        "color": alt.Color(f"{by}:O", title=_NAMES[by], sort=groups, scale=ORDER, legend=LEGEND),
    }
    title = "ΔL, nats a token"
    fitted = [row for row in (law.curves if law else ()) if row[by] in groups]
    lines = (
        alt.Chart(data(fitted))
        .mark_line(strokeWidth=1.8)
        .encode(y=alt.Y("predicted:Q", title=title), **encoding)
        if fitted
        else alt.Chart(data(cells))
        .mark_line(strokeWidth=1.2, opacity=0.7)
        .encode(y=alt.Y("mean(delta_nll):Q", title=title), **encoding)
    )
    points = (
        alt.Chart(data(cells))
        .mark_point(size=45, strokeWidth=1.5)
        .encode(
            y=alt.Y("delta_nll:Q", title=title),
            fillOpacity=alt.condition("datum.saturated", alt.value(0), alt.value(1)),
            fill=alt.Fill(f"{by}:O", sort=groups, scale=ORDER, legend=None),
            shape=alt.Shape(f"{by}:N", sort=groups, legend=None),
            tooltip=[
                alt.Tooltip(
                    f"{name}:{kind}", title=said, **({"format": ".3f"} if kind == "Q" else {})
                )
                for name, kind, said in (
                    ("rank", "O", "rank"),
                    ("n_tokens", "O", "tokens"),
                    ("seed", "O", "seed"),
                    ("delta_nll", "Q", "ΔL"),
                    ("recall", "Q", "recall"),
                    ("saturated", "N", "censored"),
                )
            ],
            **encoding,
        )
    )
    return (lines + points).properties(width=WIDTH, height=HEIGHT)


def predicted(law: LawView) -> Any:
    """Predicted over measured ΔL, with the line on which both are the same."""
    values = [row[key] for row in law.points for key in ("measured", "predicted")]
    ends = [{"at": min(values)}, {"at": max(values)}]
    line = (
        alt.Chart(data(ends))
        .mark_line(color=INK, strokeDash=[4, 4], opacity=0.6, strokeWidth=1)
        .encode(x="at:Q", y="at:Q")
    )
    points = _law_points(law).encode(
        x=alt.X("measured:Q", title="measured ΔL, nats a token", scale=alt.Scale(zero=False)),
        y=alt.Y("predicted:Q", title="predicted", scale=alt.Scale(zero=False)),
    )
    return (line + points).properties(width=WIDTH, height=HEIGHT)


def residuals(law: LawView) -> Any:
    """Measured less predicted ΔL, over the prediction."""
    zero = (
        alt.Chart(data([{"at": 0}]))
        .mark_rule(color=INK, strokeDash=[4, 4], opacity=0.6)
        .encode(y="at:Q")
    )
    points = _law_points(law).encode(
        x=alt.X("predicted:Q", title="predicted ΔL, nats a token", scale=alt.Scale(zero=False)),
        y=alt.Y("residual:Q", title="measured − predicted"),
    )
    return (zero + points).properties(width=WIDTH, height=HEIGHT)


def _law_points(law: LawView) -> Any:
    ranks = sorted({row["rank"] for row in law.points})
    return (
        alt.Chart(data(law.points))
        .mark_point(size=45, strokeWidth=1.5)
        .encode(
            color=alt.Color("rank:O", sort=ranks, scale=ORDER, legend=LEGEND),
            fill=alt.Fill("rank:O", sort=ranks, scale=ORDER, legend=None),
            shape=alt.Shape("rank:N", sort=ranks, legend=None),
            fillOpacity=alt.condition("datum.censored", alt.value(0), alt.value(1)),
            tooltip=[
                alt.Tooltip("rank:O"),
                alt.Tooltip("n_tokens:O", title="tokens"),
                alt.Tooltip("measured:Q", format=".3f"),
                alt.Tooltip("predicted:Q", format=".3f"),
                alt.Tooltip("residual:Q", format="+.3f"),
                alt.Tooltip("censored:N"),
            ],
        )
    )


def heatmaps(cells: Sequence[CellRow]) -> Any:
    """Loss and recall, rank by length, side by side: the one falls smoothly, the other jumps."""
    side = {"width": 260, "height": 220}
    return alt.hconcat(
        heatmap(cells, "nll").properties(title="loss, nats a token", **side),
        heatmap(cells, "recall").properties(title="records recalled", **side),
        spacing=40,
    ).resolve_scale(color="independent")


def heatmap(cells: Sequence[CellRow], key: str) -> Any:
    """Means of a column (`nll` or `recall`) over seeds; a censored cell's loss is marked."""
    groups: dict[tuple[int, int], list[CellRow]] = {}
    for cell in cells:
        groups.setdefault((cell["rank"], cell["n_tokens"]), []).append(cell)
    rows: list[dict[str, Any]] = []
    for (rank, n_tokens), own in sorted(groups.items()):
        value = float(np.mean([cell[key] for cell in own]))
        censored = any(cell.get("saturated") for cell in own)
        said = f"{value:.0%}" if key == "recall" else f"{value:.2f}"
        label = f"{said}{'*' if censored and key != 'recall' else ''}"
        rows.append({"rank": rank, "n_tokens": n_tokens, key: value, "label": label})
    values = [row[key] for row in rows]
    middle = 0.5 if key == "recall" else (min(values) + max(values)) / 2
    domain = [0, 1] if key == "recall" else [min(values), max(values)]
    base = alt.Chart(data(rows)).encode(
        x=alt.X("n_tokens:O", title="tokens", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("rank:O", title="rank", sort="descending"),
    )
    # Much remembered is bright in both: a low loss, a high recall.
    cells_drawn = base.mark_rect().encode(
        color=alt.Color(
            f"{key}:Q",
            title=None,
            legend=None,
            scale=alt.Scale(scheme="viridis", domain=domain, reverse=key != "recall"),
        ),
        tooltip=[
            alt.Tooltip("rank:O"),
            alt.Tooltip("n_tokens:O", title="tokens"),
            alt.Tooltip(f"{key}:Q", title=_SAID[key], format=".3f"),
        ],
    )
    bright = f"datum.{key} {'>' if key == 'recall' else '<'} {middle}"
    words = base.mark_text(fontSize=11).encode(
        text="label:N", color=alt.condition(bright, alt.value("#000"), alt.value("#fff"))
    )
    return (cells_drawn + words).properties(width=WIDTH, height=HEIGHT)


def probe_figures(view: ProbeView) -> list[Figure]:
    """The figures of a probe: of its cells and, where there is one, of the fitted law."""
    cells, law = view.cells, view.law
    hollow = (
        " Hollow points are censored: the loss had reached its floor."
        if any(cell.get("saturated") for cell in cells)
        else ""
    )
    fitted = "Lines are the fit, points are cells." if law else "Lines join the cells' means."
    found = [
        Figure(
            name="delta_loss_over_rank",
            title="ΔL over rank",
            caption=f"{fitted}{hollow}",
            chart=spec(delta_loss(cells, law, x="rank", by="n_tokens"), "ΔL over rank, by length."),
        ),
        Figure(
            name="delta_loss_over_length",
            title="ΔL over length",
            caption=f"{fitted}{hollow}",
            chart=spec(delta_loss(cells, law, x="n_tokens", by="rank"), "ΔL over length, by rank."),
        ),
        Figure(
            name="loss_heatmap",
            title="Loss",
            caption="Mean loss over seeds, nats a token; bright is low. A star marks cells with "
            "censored runs.",
            chart=spec(heatmap(cells, "nll"), "Loss by rank and length."),
        ),
        Figure(
            name="recall_heatmap",
            title="Recall",
            caption="Share of records recited word for word; bright is high. Where loss falls "
            "smoothly, recall jumps.",
            chart=spec(heatmap(cells, "recall"), "Recall by rank and length."),
        ),
    ]
    if law:
        found += [
            Figure(
                name="predicted_against_measured",
                title="Predicted against measured",
                caption="On the dashed line both are the same.",
                chart=spec(predicted(law), "Predicted over measured ΔL."),
            ),
            Figure(
                name="residuals",
                title="Residuals",
                caption="A pattern here is something that the law doesn't say.",
                chart=spec(residuals(law), "Measured less predicted ΔL over predicted."),
            ),
        ]
    return found
