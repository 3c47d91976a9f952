"""What the page shows of a probe."""

from __future__ import annotations

from typing import Any

from memlaw.report import embed, tables
from memlaw.report.probe_charts import probe_figures
from memlaw.report.probe_view import ProbeView


def probe_page(view: ProbeView, key: str) -> dict[str, Any]:
    """What the template shows of a probe's setting.

    Args:
        view: its cells and laws.
        key: the ids of its elements on the page start with it.
    """
    law, plan = view.law, view.plan
    censored = sum(bool(cell.get("saturated")) for cell in view.cells)
    return {
        "id": key,
        "name": view.name,
        "n_cells": len(view.cells),
        "n_censored": censored,
        "figures": [embed.figure(f, key) for f in probe_figures(view)],
        "tables": tables.probe_tables(view),
        "law": law,
        "r2": None if law is None or law.r2 is None else f"{law.r2:.4f}",
        "plan": plan,
        "plan_json": None
        if plan is None
        else embed.safe_json(
            {
                "logTokens": plan.log_tokens,
                "z": plan.z,
                "logRank": plan.log_rank,
                "parametersPerRank": plan.parameters_per_rank,
                "tokens": plan.tokens,
                "ranks": plan.ranks,
                "bytesPerParameter": plan.bytes_per_parameter,
            }
        ),
    }
