"""The generations of a folder: what each of them was, and going back to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def generations_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of `generations` in a `run.json`; of one that is older than them, what it says."""
    if "generations" in run:
        return [dict(line) for line in run["generations"]]
    records, results = run.get("records", {}), run.get("results", {})
    damage = results.get("damage", {})
    return [
        {
            "number": 1,
            "created": None,
            "records": records.get("n"),
            "added": records.get("n"),
            "replaced": 0,
            "removed": 0,
            "unchanged": 0,
            "n_certified": results.get("n_certified"),
            "rank": run.get("adapter", {}).get("rank"),
            "epochs": run.get("epochs"),
            "damage_nats": damage.get("delta_nll_nats"),
            "damage_ci95": damage.get("delta_nll_ci95"),
            "specific": run.get("specific"),
            "wall_s": run.get("timings", {}).get("wall_s"),
            "adapter_sha256": run.get("adapter", {}).get("sha256"),
        }
    ]
