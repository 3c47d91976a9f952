"""Charts of a run: probabilities of its tokens, its training, its damage, its generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from memlaw.measure.files import SavedAudit
from memlaw.report.charts import BLUE, INK, ORANGE, WIDTH, Figure, data, spec
from memlaw.report.run_view import RunView

_BINS = 40
_ONCE = "the base model, once"


def probability_bins(p: np.ndarray) -> list[dict[str, float]]:
    """How many values of p lie in each fortieth of 0 to 1, as rows `low`, `high`, `n`."""
    counts, edges = np.histogram(np.clip(p, 0, 1), bins=_BINS, range=(0, 1))
    return [
        {"low": float(low), "high": float(high), "n": int(n)}
        for n, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def histogram(recall: SavedAudit) -> Any:
    """How many target tokens have which p; those under the line in another colour."""
    line = alt.param(name="line", value=recall.criterion.line)
    p = np.exp(-recall.tokens.nll_nats.astype(np.float64))  # as the page's script computes it
    shown = alt.Data(values=probability_bins(p), name="bins")
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
    return (bars + rule).add_params(line).properties(width=WIDTH, height=150)


def training(run: Mapping[str, Any]) -> Any:
    """Loss, and the share of tokens over the line, epoch by epoch; of the content of run.json."""
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
    base = alt.Chart(data(rows))
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
        .properties(width=WIDTH, height=150)
    )


def damage(run: Mapping[str, Any]) -> Any:
    """Change on each unseen text, the mean and its 95 % interval; of the content of run.json."""
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
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color=INK, opacity=0.5).encode(x="at:Q")
    ticks = (
        alt.Chart(data(windows))
        .mark_tick(color=INK, opacity=0.35, height=16)
        .encode(
            x=alt.X("value:Q", title="nats a token", axis=alt.Axis(tickCount=6)),
            y=y,
            tooltip=[alt.Tooltip("value:Q", format="+.4f", title="one text")],
        )
    )
    interval = (
        alt.Chart(data(means))
        .mark_rule(color=BLUE, strokeWidth=5)
        .encode(x="low:Q", x2="high:Q", y=y)
    )
    mean = (
        alt.Chart(data(means))
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
    return (zero + ticks + interval + mean).properties(width=WIDTH, height=110)


def stream(lines: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, Any]:
    """Seconds, damage and size of each generation, a chart each; of `generations` in run.json.

    What a line doesn't say is left out: a generation that was reverted to has no seconds, and
    earlier versions didn't tell training from the rest.
    """
    rows = [
        {
            "generation": line["number"],
            "part": part,
            "seconds": seconds,
            "how": "anew" if line.get("anew") else "changed",
        }
        for line in lines
        for part, seconds in _parts(line)
    ]
    harms = [{"generation": line["number"], **harm} for line in lines if (harm := _harm(line))]
    sizes = [
        {"generation": line["number"], "what": what, "n": line[what]}
        for line in lines
        for what in ("records", "rank")
        if line.get(what) is not None
    ]
    x = alt.X(
        "generation:O",
        title="generation",
        axis=alt.Axis(labelAngle=0, labelOverlap=True),
        scale=alt.Scale(domain=[line["number"] for line in lines]),
    )
    colours = {
        "training": BLUE,
        "given up": ORANGE,
        _ONCE: "#d9d9d9",
        "the rest": "#9ecae1",
        "in all": "#bbbbbb",
    }
    there = [part for part in colours if any(row["part"] == part for row in rows)]
    parts = alt.Scale(domain=there, range=[colours[part] for part in there])
    seconds = (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            x=x,
            y=alt.Y("seconds:Q", title="seconds", axis=alt.Axis(tickCount=4)),
            color=alt.Color("part:N", title=None, scale=parts),
            order=alt.Order("part:N", sort="descending"),
            tooltip=["generation:O", "part:N", alt.Tooltip("seconds:Q", format=",.0f"), "how:N"],
        )
    )
    interval = (
        alt.Chart(data(harms))
        .mark_rule(color=BLUE, strokeWidth=2)
        .encode(x=x, y="low:Q", y2="high:Q")
    )
    mean = (
        alt.Chart(data(harms))
        .mark_point(color=BLUE, fill=BLUE, size=40, shape="diamond")
        .encode(
            x=x,
            y=alt.Y("mean:Q", title="ΔNLL, nats a token", axis=alt.Axis(tickCount=4)),
            tooltip=["generation:O", alt.Tooltip("mean:Q", format="+.4f")],
        )
    )
    size = (
        alt.Chart(data(sizes))
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=x,
            y=alt.Y("n:Q", title="records, rank", axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["records", "rank"], range=[BLUE, ORANGE]),
            ),
            strokeDash=alt.StrokeDash("what:N", legend=None),
            tooltip=["generation:O", "what:N", "n:Q"],
        )
    )
    return tuple(
        chart.properties(width=WIDTH, height=150) for chart in (seconds, interval + mean, size)
    )


def _parts(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What a generation's seconds went into, as far as its line says it.

    Of a run that was resumed only the last process's are known beside all of the training.
    """
    wall_s, training_s, given_up_s, once_s = (
        value if isinstance(value := line.get(name), int | float) else None
        for name in ("wall_s", "training_s", "given_up_s", "once_s")
    )
    if wall_s is None:
        return []
    if training_s is None:
        return [("in all", wall_s)]
    parts = {"training": training_s, "given up": given_up_s or 0.0, _ONCE: once_s or 0.0}
    parts["the rest"] = wall_s - sum(parts.values())
    return [(part, seconds) for part, seconds in parts.items() if seconds > 0]


def _harm(line: Mapping[str, Any]) -> dict[str, float]:
    """A generation's damage and its interval; empty where its line doesn't say it."""
    try:
        low, high = line["damage_ci95"]
        return {"mean": float(line["damage_nats"]), "low": float(low), "high": float(high)}
    except (KeyError, TypeError, ValueError):
        return {}


def run_figures(view: RunView) -> list[Figure]:
    """The figures of a write folder or an audit."""
    recall, line = view.recall, f"{view.recall.criterion.line:g}"
    found = [
        Figure(
            name="probability",
            title="How sure the model is",
            caption=f"Target tokens by the probability the model gives them; the line is at "
            f"{line}. The scale of counts is a square root, so that single tokens show.",
            chart=spec(
                histogram(recall),
                f"Histogram of the probability of {len(recall.tokens)} target tokens; "
                f"{recall.n_under} are under {line}.",
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
                chart=spec(
                    training(view.run),
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
                chart=spec(
                    damage(view.run),
                    "Change of the negative log-likelihood and KL divergence on unseen texts.",
                ),
                columns=1,
            )
        )
    lines = (view.run or {}).get("generations", [])
    if len(lines) > 1:
        found += _stream_figures(lines)
    return found


def _stream_figures(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    told = (
        ("seconds", "What each generation took", "All seconds, by what they went into."),
        ("damage", "What each does to unseen text", "ΔNLL: the mean and its 95 % interval."),
        ("size", "How large each is", "Records, and columns of the adapter."),
    )
    return [
        Figure(
            name=f"generations_{name}",
            title=title,
            caption=caption,
            chart=spec(chart, f"{title}, of {len(lines)} generations."),
        )
        for (name, title, caption), chart in zip(told, stream(lines), strict=True)
    ]
