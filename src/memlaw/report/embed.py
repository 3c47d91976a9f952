"""Data that stand in the page: escaped JSON, arrays as base64, charts as wide as their place.

Text from records reaches the page as data only, which the page's script shows by `textContent`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from memlaw.report.charts import Figure


def safe_json(content: Any) -> Markup:
    """JSON that may stand in a script element, whatever text is in it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def array(values: Any, dtype: str) -> str:
    """Numbers as base64 of a little-endian array.

    Args:
        values: numbers.
        dtype: NumPy's name for what the script reads them as, as `<f4`.
    """
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def figure(figure: Figure, key: str) -> dict[str, Any]:
    """What the template shows of a figure.

    Args:
        figure: the figure.
        key: of the run or probe that it belongs to; part of its id on the page.
    """
    return {
        "id": f"chart-{key}-{figure.name}",
        "title": figure.title,
        "caption": figure.caption,
        "json": safe_json(_narrow(figure.chart)),
        "columns": figure.columns,
    }


def _narrow(chart: Mapping[str, Any]) -> dict[str, Any]:
    """As wide as its place on the page, whose script chooses colours for light and dark."""
    config = {key: value for key, value in chart["config"].items() if key != "range"}
    return {
        **chart,
        "config": config,
        "width": "container",
        "autosize": {"type": "fit", "contains": "padding"},
    }
