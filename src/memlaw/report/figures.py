"""Figures for papers: of cells and a fitted law, and of one adapter. Each is an Altair chart.

Example:
    >>> from memlaw.report.figures import delta_loss_over_rank
    >>> cells = [{"rank": 1, "n_tokens": 32, "delta_nll": 2.0, "saturated": False}]
    >>> chart = delta_loss_over_rank(cells)
    >>> chart.save("delta_loss.svg")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memlaw.law.rows import CellRow
from memlaw.measure.files import SavedAudit
from memlaw.report import probe_charts, run_charts
from memlaw.report.charts import Figure as Figure
from memlaw.report.charts import export as export
from memlaw.report.charts import styled
from memlaw.report.probe_charts import probe_figures as probe_figures
from memlaw.report.probe_view import LawView
from memlaw.report.run_charts import run_figures as run_figures


def delta_loss_over_rank(cells: Sequence[CellRow], law: LawView | None = None) -> Any:
    """ΔL over rank, a line for each length; censored cells hollow; lines of the fit, if given."""
    return styled(probe_charts.delta_loss(cells, law, x="rank", by="n_tokens"))


def delta_loss_over_length(cells: Sequence[CellRow], law: LawView | None = None) -> Any:
    """ΔL over length, a line for each rank; censored cells hollow; lines of the fit, if given."""
    return styled(probe_charts.delta_loss(cells, law, x="n_tokens", by="rank"))


def predicted_against_measured(law: LawView) -> Any:
    """Predicted over measured ΔL, with the line on which both are the same."""
    return styled(probe_charts.predicted(law))


def residuals(law: LawView) -> Any:
    """Measured less predicted ΔL, over the prediction."""
    return styled(probe_charts.residuals(law))


def heatmaps(cells: Sequence[CellRow]) -> Any:
    """Loss and recall, rank by length, side by side: the one falls smoothly, the other jumps."""
    return styled(probe_charts.heatmaps(cells))


def probability_histogram(recall: SavedAudit) -> Any:
    """How many target tokens have which p; those under the line in another colour."""
    return styled(run_charts.histogram(recall))


def training_curve(run: Mapping[str, Any]) -> Any:
    """Loss, and the share of tokens over the line, epoch by epoch; of the content of run.json."""
    return styled(run_charts.training(run))


def damage_by_window(run: Mapping[str, Any]) -> Any:
    """Change on each unseen text, the mean and its 95 % interval; of the content of run.json."""
    return styled(run_charts.damage(run))
