"""Figures: of cells and a fitted law, and of one adapter. Each is an Altair chart.

Colours are from Okabe and Ito, and viridis where they stand for an order: told apart by
colour-blind eyes, and on paper in grey by their lightness. Shapes and labels say it once more.

Example:
    >>> from memlaw.report.figures import delta_loss_over_rank
    >>> cells = [{"rank": 1, "n_tokens": 32, "delta_nll": 2.0, "saturated": False}]
    >>> chart = delta_loss_over_rank(cells)
    >>> chart.save("delta_loss.svg")  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from memlaw.law.rows import CellRow
from memlaw.report.sources import LawView, ProbeView, Recall, RunView

BLUE, ORANGE, INK = "#0072B2", "#D55E00", "currentColor"
_WIDTH, _HEIGHT = 380, 260
_BINS = 40
_ORDER = alt.Scale(range="ordinal")
_LEGEND = alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart and what is said of it.

    Attributes:
        name: of its file, without a suffix.
        title: what it shows.
        caption: how to read it.
        chart: its Vega-Lite specification.
        columns: half of the page's width is enough, where 2.
    """

    name: str
    title: str
    caption: str
    chart: dict[str, Any]
    columns: int = 2


def _styled(chart: Any) -> Any:
    """Quiet axes in the colour of the text around the figure, whatever that is."""
    return (
        chart.configure(font="system-ui, sans-serif", background="transparent")
        .configure_axis(
            labelColor=INK,
            titleColor=INK,
            domainColor=INK,
            tickColor=INK,
            gridColor=INK,
            gridOpacity=0.12,
            domainOpacity=0.4,
            tickOpacity=0.4,
            labelFontSize=11,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(
            labelColor=INK,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=12,
            symbolSize=70,
        )
        .configure_view(stroke=None)
        .configure_range(ordinal=alt.RangeScheme(scheme="viridis", extent=[0, 0.85]))
        .configure_header(labelColor=INK, titleColor=INK)
        .configure_title(color=INK, fontSize=12, fontWeight="normal", anchor="start")
    )


def _spec(chart: Any, description: str) -> dict[str, Any]:
    found: dict[str, Any] = _styled(chart).properties(description=description).to_dict()
    return found


def _data(rows: Sequence[Mapping[str, Any]]) -> Any:
    return alt.Data(values=[dict(row) for row in rows])


# ---------------------------------------------------------------- cells and the law


def delta_loss_over_rank(cells: Sequence[CellRow], law: LawView | None = None) -> Any:
    """ΔL over rank, a line a length; censored cells hollow; the fit, if given, as lines."""
    return _styled(_over(cells, law, x="rank", by="n_tokens"))


def delta_loss_over_length(cells: Sequence[CellRow], law: LawView | None = None) -> Any:
    """ΔL over length, a line a rank; censored cells hollow; the fit, if given, as lines."""
    return _styled(_over(cells, law, x="n_tokens", by="rank"))


_SAID = {"nll": "loss, nats", "recall": "recall"}
_NAMES = {"rank": "rank", "n_tokens": "tokens"}


def _over(cells: Sequence[CellRow], law: LawView | None, *, x: str, by: str) -> Any:
    values = sorted({cell[x] for cell in cells})
    groups = sorted({cell[by] for cell in cells})
    scale = alt.Scale(type="log", nice=False, padding=12)
    encoding = {
        "x": alt.X(f"{x}:Q", title=_NAMES[x], scale=scale, axis=alt.Axis(values=values, grid=True)),
        "color": alt.Color(f"{by}:O", title=_NAMES[by], sort=groups, scale=_ORDER, legend=_LEGEND),
    }
    title = "ΔL, nats a token"
    fitted = [row for row in (law.curves if law else ()) if row[by] in groups]
    lines = (
        alt.Chart(_data(fitted))
        .mark_line(strokeWidth=1.8)
        .encode(y=alt.Y("predicted:Q", title=title), **encoding)
        if fitted
        else alt.Chart(_data(cells))
        .mark_line(strokeWidth=1.2, opacity=0.7)
        .encode(y=alt.Y("mean(delta_nll):Q", title=title), **encoding)
    )
    points = (
        alt.Chart(_data(cells))
        .mark_point(size=45, strokeWidth=1.5)
        .encode(
            y=alt.Y("delta_nll:Q", title=title),
            fillOpacity=alt.condition("datum.saturated", alt.value(0), alt.value(1)),
            fill=alt.Fill(f"{by}:O", sort=groups, scale=_ORDER, legend=None),
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
    return (lines + points).properties(width=_WIDTH, height=_HEIGHT)


def predicted_against_measured(law: LawView) -> Any:
    """Predicted over measured ΔL, with the line on which both are the same."""
    return _styled(_predicted(law))


def _predicted(law: LawView) -> Any:
    values = [row[key] for row in law.points for key in ("measured", "predicted")]
    ends = [{"at": min(values)}, {"at": max(values)}]
    line = (
        alt.Chart(_data(ends))
        .mark_line(color=INK, strokeDash=[4, 4], opacity=0.6, strokeWidth=1)
        .encode(x="at:Q", y="at:Q")
    )
    points = _law_points(law).encode(
        x=alt.X("measured:Q", title="measured ΔL, nats a token", scale=alt.Scale(zero=False)),
        y=alt.Y("predicted:Q", title="predicted", scale=alt.Scale(zero=False)),
    )
    return (line + points).properties(width=_WIDTH, height=_HEIGHT)


def residuals(law: LawView) -> Any:
    """Measured less predicted ΔL, over the prediction."""
    return _styled(_residuals(law))


def _residuals(law: LawView) -> Any:
    zero = (
        alt.Chart(_data([{"at": 0}]))
        .mark_rule(color=INK, strokeDash=[4, 4], opacity=0.6)
        .encode(y="at:Q")
    )
    points = _law_points(law).encode(
        x=alt.X("predicted:Q", title="predicted ΔL, nats a token", scale=alt.Scale(zero=False)),
        y=alt.Y("residual:Q", title="measured − predicted"),
    )
    return (zero + points).properties(width=_WIDTH, height=_HEIGHT)


def _law_points(law: LawView) -> Any:
    ranks = sorted({row["rank"] for row in law.points})
    return (
        alt.Chart(_data(law.points))
        .mark_point(size=45, strokeWidth=1.5)
        .encode(
            color=alt.Color("rank:O", sort=ranks, scale=_ORDER, legend=_LEGEND),
            fill=alt.Fill("rank:O", sort=ranks, scale=_ORDER, legend=None),
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
    return _styled(
        alt.hconcat(
            _heatmap(cells, "nll").properties(title="loss, nats a token", **side),
            _heatmap(cells, "recall").properties(title="records recalled", **side),
            spacing=40,
        ).resolve_scale(color="independent")
    )


def _heatmap(cells: Sequence[CellRow], key: str) -> Any:
    """Means over seeds; a censored cell's loss is marked."""
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
    base = alt.Chart(_data(rows)).encode(
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
    return (cells_drawn + words).properties(width=_WIDTH, height=_HEIGHT)


# ---------------------------------------------------------------- one adapter


def probability_bins(p: np.ndarray) -> list[dict[str, float]]:
    """How many of p lie in each fortieth of 0 to 1, as rows `low`, `high`, `n`."""
    counts, edges = np.histogram(np.clip(p, 0, 1), bins=_BINS, range=(0, 1))
    return [
        {"low": float(low), "high": float(high), "n": int(n)}
        for n, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def probability_histogram(recall: Recall) -> Any:
    """How probable the right tokens are; those under the line in another colour."""
    return _styled(_histogram(recall))


def _histogram(recall: Recall) -> Any:
    line = alt.param(name="line", value=recall.line)
    shown = alt.Data(values=probability_bins(recall.p), name="bins")
    bars = (
        alt.Chart(shown)
        .mark_bar()
        .encode(
            x=alt.X(
                "low:Q",
                title="p of the right token",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], grid=False),
            ),
            x2="high:Q",
            y2=alt.datum(0),
            y=alt.Y(
                "n:Q", title="tokens", scale=alt.Scale(type="sqrt"), axis=alt.Axis(tickCount=4)
            ),
            color=alt.condition("datum.high <= line + 1e-9", alt.value(ORANGE), alt.value(BLUE)),
            tooltip=[
                alt.Tooltip("low:Q", title="p from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
                alt.Tooltip("n:Q", title="tokens"),
            ],
        )
    )
    rule = (
        alt.Chart(alt.Data(values=[{}]))
        .transform_calculate(at="line")
        .mark_rule(color=INK, strokeDash=[4, 3], strokeWidth=1.5)
        .encode(x="at:Q")
    )
    return (bars + rule).add_params(line).properties(width=_WIDTH, height=150)


def training_curve(run: Mapping[str, Any]) -> Any:
    """Loss, and the share of tokens over the line, epoch by epoch."""
    return _styled(_curve(run))


def _curve(run: Mapping[str, Any]) -> Any:
    n_tokens = max(1, run["records"]["n_target_tokens"])
    rows = [
        {
            "epoch": e["epoch"],
            "loss": e["nll_nats"],
            "share": 1 - e["n_under"] / n_tokens,
            "rank": e["rank"],
        }
        for e in run["curve"]
    ]
    at = alt.param(name="epoch", value=rows[-1]["epoch"])
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(grid=False, tickMinStep=1))
    tooltip = [
        alt.Tooltip("epoch:Q"),
        alt.Tooltip("loss:Q", format=".4f", title="loss, nats"),
        alt.Tooltip("share:Q", format=".1%", title="tokens over the line"),
        alt.Tooltip("rank:Q"),
    ]
    base = alt.Chart(_data(rows))
    share = base.mark_line(color=BLUE, strokeWidth=2).encode(
        x=x,
        y=alt.Y(
            "share:Q",
            title="tokens over the line",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(format="%", tickCount=4, titleColor=INK),
        ),
        tooltip=tooltip,
    )
    loss = base.mark_line(color=ORANGE, strokeDash=[5, 3], strokeWidth=2).encode(
        x=x,
        y=alt.Y("loss:Q", title="loss, nats (dashed)", axis=alt.Axis(tickCount=4, grid=False)),
        tooltip=tooltip,
    )
    rule = (
        alt.Chart(alt.Data(values=[{}]))
        .transform_calculate(at="epoch")
        .mark_rule(color=INK, strokeWidth=1, opacity=0.7)
        .encode(x="at:Q")
    )
    return (
        alt.layer(share, loss, rule)
        .resolve_scale(y="independent")
        .add_params(at)
        .properties(width=_WIDTH, height=150)
    )


def damage_by_window(run: Mapping[str, Any]) -> Any:
    """Change on each unseen text; the mean and its 95 % interval."""
    return _styled(_damage(run))


def _damage(run: Mapping[str, Any]) -> Any:
    damage = run["results"]["damage"]
    kinds = (("ΔNLL", "delta_nll_nats", "delta_nll_ci95"), ("KL", "kl_nats", "kl_ci95"))
    order = [name for name, *_ in kinds]
    means = [
        {"kind": name, "mean": damage[key], "low": damage[ci][0], "high": damage[ci][1]}
        for name, key, ci in kinds
    ]
    windows = [
        {"kind": name, "value": window[key]}
        for window in run["results"].get("damage_by_window", [])
        for name, key, _ in kinds
    ]
    y = alt.Y("kind:N", title=None, sort=order, axis=alt.Axis(labelFontSize=13, ticks=False))
    zero = alt.Chart(_data([{"at": 0}])).mark_rule(color=INK, opacity=0.5).encode(x="at:Q")
    ticks = (
        alt.Chart(_data(windows))
        .mark_tick(color=INK, opacity=0.35, height=16)
        .encode(
            x=alt.X("value:Q", title="nats a token", axis=alt.Axis(tickCount=6)),
            y=y,
            tooltip=[alt.Tooltip("value:Q", format="+.4f", title="one text")],
        )
    )
    interval = (
        alt.Chart(_data(means))
        .mark_rule(color=BLUE, strokeWidth=5)
        .encode(x="low:Q", x2="high:Q", y=y)
    )
    mean = (
        alt.Chart(_data(means))
        .mark_point(color=BLUE, fill=BLUE, size=110, shape="diamond")
        .encode(
            x="mean:Q",
            y=y,
            tooltip=[
                alt.Tooltip("kind:N"),
                alt.Tooltip("mean:Q", format="+.4f"),
                alt.Tooltip("low:Q", format="+.4f", title="95 % from"),
                alt.Tooltip("high:Q", format="+.4f", title="to"),
            ],
        )
    )
    return (zero + ticks + interval + mean).properties(width=_WIDTH, height=110)


# ---------------------------------------------------------------- what a page shows


def run_figures(view: RunView) -> list[Figure]:
    """Those of a write folder or an audit."""
    recall = view.recall
    n_under = int((recall.p < recall.line).sum())
    found = [
        Figure(
            name="probability",
            title="How sure the model is",
            caption=f"Target tokens by the probability the model gives them; the line is at "
            f"{recall.line:g}. The scale of counts is a square root, so that single tokens show.",
            chart=_spec(
                _histogram(recall),
                f"Histogram of the probability of {len(recall.token)} target tokens; {n_under} "
                f"are under {recall.line:g}.",
            ),
        )
    ]
    if view.run and view.run.get("curve"):
        found.append(
            Figure(
                name="training",
                title="How it was learnt",
                caption="The share of tokens over the line (left) and the loss (right, dashed), "
                "as training saw them in each epoch.",
                chart=_spec(
                    _curve(view.run),
                    "Share of tokens over the line and loss over the epochs of training.",
                ),
            )
        )
    if view.run and view.run.get("results", {}).get("damage"):
        found.append(
            Figure(
                name="damage",
                title="What it does to other text",
                caption="Each tick is one text; the diamond is the mean, the bar its 95 % "
                "interval. 0 is no change.",
                chart=_spec(
                    _damage(view.run),
                    "Change of the negative log-likelihood and KL divergence on unseen texts.",
                ),
                columns=1,
            )
        )
    return found


def probe_figures(view: ProbeView) -> list[Figure]:
    """Those of a probe: the measured cells and, where there is one, the fitted law."""
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
            chart=_spec(_over(cells, law, x="rank", by="n_tokens"), "ΔL over rank, by length."),
        ),
        Figure(
            name="delta_loss_over_length",
            title="ΔL over length",
            caption=f"{fitted}{hollow}",
            chart=_spec(_over(cells, law, x="n_tokens", by="rank"), "ΔL over length, by rank."),
        ),
        Figure(
            name="loss_heatmap",
            title="Loss",
            caption="Mean loss over seeds, nats a token; bright is low. A star marks cells with "
            "censored runs.",
            chart=_spec(_heatmap(cells, "nll"), "Loss by rank and length."),
        ),
        Figure(
            name="recall_heatmap",
            title="Recall",
            caption="Share of records recited word for word; bright is high. Where loss falls "
            "smoothly, recall jumps.",
            chart=_spec(_heatmap(cells, "recall"), "Recall by rank and length."),
        ),
    ]
    if law:
        found += [
            Figure(
                name="predicted_against_measured",
                title="Predicted against measured",
                caption="On the dashed line both are the same.",
                chart=_spec(_predicted(law), "Predicted over measured ΔL."),
            ),
            Figure(
                name="residuals",
                title="Residuals",
                caption="A pattern here is something that the law doesn't say.",
                chart=_spec(_residuals(law), "Measured less predicted ΔL over predicted."),
            ),
        ]
    return found


def export(chart: Mapping[str, Any], kind: str) -> bytes:
    """A specification as a picture, for print: dark on white.

    Args:
        chart: as in `Figure.chart`.
        kind: `png` or `svg`.
    """
    import vl_convert

    spec = json.loads(json.dumps(chart).replace(INK, "#1a1a1a"))
    spec["background"] = "white"
    spec["padding"] = 12
    if kind == "svg":
        return str(vl_convert.vegalite_to_svg(spec)).encode()
    return bytes(vl_convert.vegalite_to_png(spec, scale=3))
