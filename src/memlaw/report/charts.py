"""What all charts share: colours, sizes, axes; a figure with its caption; a chart as a picture.

Colours are from Okabe and Ito, and viridis where they stand for an order: told apart by
colour-blind eyes, and on paper in grey by their lightness. Shapes and labels say it once more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

BLUE, ORANGE, INK = "#0072B2", "#D55E00", "currentColor"
WIDTH, HEIGHT = 380, 260  # pixels
ORDER = alt.Scale(range="ordinal")
LEGEND = alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1)


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


def styled(chart: Any) -> Any:
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


def spec(chart: Any, description: str) -> dict[str, Any]:
    """A chart's Vega-Lite specification, with a description for screen readers."""
    found: dict[str, Any] = styled(chart).properties(description=description).to_dict()
    return found


def data(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as the data of a chart."""
    return alt.Data(values=[dict(row) for row in rows])


def export(chart: Mapping[str, Any], kind: str) -> bytes:
    """A specification as a picture: dark on white, for print.

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
