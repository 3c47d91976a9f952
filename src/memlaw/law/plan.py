"""The planner: the smallest rank for so many tokens, the most tokens for a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memlaw.core.criterion import Criterion
from memlaw.law.estimator import LawError
from memlaw.law.recall_law import Measure, RecallLaw, reached
from memlaw.law.rows import CellRow, choose_cells, number

_FLOAT32_BYTES = 4
_MOST = 2**20  # ranks and tokens above this are no answer


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """The answer of `plan_rank`.

    Attributes:
        n_tokens: target tokens to store.
        goal: what counts as success, in words.
        confidence: the probability of success asked for, in (0, 1).
        rank: the smallest allowed rank whose probability of success is `confidence` or more.
        probability: that `rank` succeeds on data not seen yet.
        probability_at_half: that half of `rank`, rounded down, succeeds; None if that is rank 0.
        rank_interval: 95 % interval of the smallest rank that succeeds on data not seen yet.
        n_parameters: trainable parameters at `rank`.
        adapter_mb: size of its float32 safetensors, megabytes (10⁶ bytes).
        train_s: expected training time in seconds, on the machine that the cells were trained on;
            None if fewer than five cells have a time.
        extrapolates: a sentence for each way in which the answer is outside what was probed.
    """

    n_tokens: int
    goal: str
    confidence: float
    rank: int
    probability: float
    probability_at_half: float | None
    rank_interval: tuple[int, int]
    n_parameters: int
    adapter_mb: float
    train_s: float | None
    extrapolates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokensPlan:
    """The answer of `plan_tokens`.

    Attributes:
        rank: the adapter's rank.
        goal: what counts as success, in words.
        confidence: the probability of success asked for, in (0, 1).
        n_tokens: the most target tokens whose probability of success is `confidence` or more.
        probability: that `n_tokens` succeed on data not seen yet.
        tokens_interval: 95 % interval of the most tokens that succeed on data not seen yet.
        n_parameters, adapter_mb, train_s, extrapolates: as in `RankPlan`.
    """

    rank: int
    goal: str
    confidence: float
    n_tokens: int
    probability: float
    tokens_interval: tuple[int, int]
    n_parameters: int
    adapter_mb: float
    train_s: float | None
    extrapolates: tuple[str, ...]


def plan_rank(
    cells: Sequence[CellRow],
    n_tokens: int,
    *,
    recall: float = 1.0,
    confidence: float = 0.9,
    measure: Measure = "records",
    ranks: Iterable[int] | None = None,
    where: Mapping[str, Any] | None = None,
) -> RankPlan:
    """The smallest rank expected to succeed: the threshold's `confidence` quantile, rounded up.

    The distribution of the threshold is `RecallLaw`'s, for data not seen yet: it includes the
    spread between data sets and the uncertainty of the law's parameters. No margin is added.

    Args:
        cells: rows of a probe, all of one task and setting, or `where` chooses one.
        n_tokens: target tokens to store, ≥ 1.
        recall: in (0, 1]. 1: certified, every token at the required probability or more,
            teacher-forced. Below 1: that share of records recited, or of tokens at the required
            probability or more, by `measure`.
        confidence: in (0, 1): the probability of success asked for.
        measure: records or tokens; at recall 1 it makes no difference.
        ranks: ranks allowed; None: every whole number.
        where: column to value, as {"task": "phonebook"}.

    Returns:
        The rank and what it costs.

    Raises:
        LawError: a setting out of range; cells mix settings; no cell succeeds, or all do; no
            allowed rank is large enough.

    Source: ours.
    """
    if n_tokens < 1:
        raise LawError(f"n_tokens is {n_tokens}; it must be 1 or more.")
    chosen, law = _fit(cells, recall, confidence, measure, where)

    def probability(rank: int) -> float:
        return float(law.probability([[rank, n_tokens]])[0])

    enough = law.size_quantile(n_tokens, confidence)
    allowed = None if ranks is None else sorted(set(ranks))
    if allowed is not None and (not allowed or allowed[0] < 1):
        raise LawError(f"The allowed ranks are {allowed}; they must be whole numbers from 1.")
    fitting = _whole_from(enough) if allowed is None else [r for r in allowed if r >= enough]
    if not fitting:
        said = f"about rank {math.ceil(enough)} is needed" if enough < _MOST else "no rank would do"
        best = (
            ""
            if allowed is None
            else (
                f" The largest allowed, {allowed[-1]}, succeeds with probability "
                f"{probability(allowed[-1]):.2f}."
            )
        )
        raise LawError(
            f"For {n_tokens} tokens with confidence {confidence:g} {said}.{best} Allow larger "
            "ranks, ask for fewer tokens, or probe closer to what is asked."
        )
    rank = fitting[0]
    ends = [max(1, math.ceil(law.size_quantile(n_tokens, p))) for p in (0.025, 0.975)]
    n_parameters = _n_parameters(chosen, rank)
    return RankPlan(
        n_tokens=int(n_tokens),
        goal=goal_text(recall, measure),
        confidence=confidence,
        rank=rank,
        probability=probability(rank),
        probability_at_half=probability(rank // 2) if rank > 1 else None,
        rank_interval=(ends[0], ends[1]),
        n_parameters=n_parameters,
        adapter_mb=n_parameters * _FLOAT32_BYTES / 1e6,
        train_s=_train_s(chosen, rank, n_tokens),
        extrapolates=_extrapolates(chosen, reached(chosen, recall, measure), rank, n_tokens),
    )


def plan_tokens(
    cells: Sequence[CellRow],
    rank: int,
    *,
    recall: float = 1.0,
    confidence: float = 0.9,
    measure: Measure = "records",
    where: Mapping[str, Any] | None = None,
) -> TokensPlan:
    """The most target tokens that a rank is expected to store: the inverse of `plan_rank`.

    Args:
        cells, recall, confidence, measure, where: as `plan_rank`.
        rank: ≥ 1.

    Returns:
        The number of tokens, and what the adapter costs.

    Raises:
        LawError: as `plan_rank`; not even one token is expected to succeed.

    Source: ours.
    """
    if rank < 1:
        raise LawError(f"rank is {rank}; it must be 1 or more.")
    chosen, law = _fit(cells, recall, confidence, measure, where)
    n_tokens = _most_tokens(law, rank, confidence)
    if n_tokens < 1:
        raise LawError(
            f"Rank {rank} isn't expected to store even one token with confidence {confidence:g}. "
            "Ask for a larger rank or less confidence."
        )
    ends = [max(1, _most_tokens(law, rank, p)) for p in (0.975, 0.025)]
    n_parameters = _n_parameters(chosen, rank)
    return TokensPlan(
        rank=int(rank),
        goal=goal_text(recall, measure),
        confidence=confidence,
        n_tokens=n_tokens,
        probability=float(law.probability([[rank, n_tokens]])[0]),
        tokens_interval=(ends[0], ends[1]),
        n_parameters=n_parameters,
        adapter_mb=n_parameters * _FLOAT32_BYTES / 1e6,
        train_s=_train_s(chosen, rank, n_tokens),
        extrapolates=_extrapolates(chosen, reached(chosen, recall, measure), rank, n_tokens),
    )


def goal_text(recall: float, measure: Measure) -> str:
    """What success means, in words; arguments as in `plan_rank`."""
    if recall == 1:
        return f"certified: every token at p {Criterion().line:g} or more, teacher-forced"
    if measure == "records":
        return f"at least {recall:g} of the records recited word for word"
    return f"at least {recall:g} of the target tokens over the line"


def _fit(
    cells: Sequence[CellRow],
    recall: float,
    confidence: float,
    measure: Measure,
    where: Mapping[str, Any] | None,
) -> tuple[list[CellRow], RecallLaw]:
    if not 0 < confidence < 1:
        raise LawError(f"confidence is {confidence:g}; it must lie between 0 and 1.")
    chosen = choose_cells(cells, where)
    success = reached(chosen, recall, measure)
    if success.all() or not success.any():
        goal = goal_text(recall, measure)
        sizes = sorted({int(number(cell, "rank")) for cell in chosen})
        lengths = sorted({int(number(cell, "n_tokens")) for cell in chosen})
        grid = f"ranks {sizes[0]} to {sizes[-1]}, {lengths[0]} to {lengths[-1]} tokens"
        if success.all():
            raise LawError(
                f"All {len(chosen)} cells ({grid}) succeed ({goal}): the limit isn't among them. "
                "Probe smaller ranks or longer targets."
            )
        raise LawError(
            f"None of {len(chosen)} cells ({grid}) succeeds ({goal}). Probe larger ranks, shorter "
            "targets, or more steps."
        )
    return chosen, RecallLaw().fit_cells(chosen, recall=recall, measure=measure)


def _whole_from(size: float) -> list[int]:
    return [max(1, math.ceil(size))] if size < _MOST else []


def _most_tokens(law: RecallLaw, rank: int, probability: float) -> int:
    """The largest length before the probability first falls under what is asked; 0: none."""
    lengths = np.unique(np.geomspace(1, _MOST, 120).round())
    p = law.probability(np.column_stack([np.full(len(lengths), float(rank)), lengths]))
    # A bent law may turn round far from the grid; the centre is where the search starts.
    start = int(np.searchsorted(lengths, law.centre_tokens_))
    if p[start] >= probability:
        under = np.flatnonzero(p[start:] < probability)
        if not len(under):
            return _MOST
        low, high = lengths[start + under[0] - 1], lengths[start + under[0]]
    else:
        over = np.flatnonzero(p[:start] >= probability)
        if not len(over):
            return 0
        low, high = lengths[over[-1]], lengths[over[-1] + 1]
    while high - low > 1:
        middle = (low + high) // 2
        if law.probability([[rank, middle]])[0] >= probability:
            low = middle
        else:
            high = middle
    return int(low)


def _n_parameters(cells: Sequence[CellRow], rank: int) -> int:
    """A LoRA's parameters are proportional to its rank."""
    per_rank = {number(cell, "n_parameters") / number(cell, "rank") for cell in cells}
    if max(per_rank) > 1.001 * min(per_rank):
        raise LawError(
            "The cells mix adapters: parameters a rank go from "
            f"{min(per_rank):g} to {max(per_rank):g}. Choose one placement with where=..."
        )
    return round(rank * min(per_rank))


def _train_s(cells: Sequence[CellRow], rank: int, n_tokens: float) -> float | None:
    """By least squares of ln wall_s on ln rank and ln n_tokens; None under five timed cells."""
    timed = [c for c in cells if c.get("wall_s") is not None and number(c, "wall_s") > 0]
    if len(timed) < 5:
        return None
    columns = [np.log([number(cell, name) for cell in timed]) for name in ("rank", "n_tokens")]
    centre = [column.mean() for column in columns]
    design = np.column_stack(
        [np.ones(len(timed)), *(c - m for c, m in zip(columns, centre, strict=True))]
    )
    wall = np.log([number(cell, "wall_s") for cell in timed])
    theta = np.linalg.lstsq(design, wall, rcond=None)[0]
    at = np.array([1.0, math.log(rank) - centre[0], math.log(n_tokens) - centre[1]])
    return float(np.exp(at @ theta))


def _extrapolates(
    cells: Sequence[CellRow], success: np.ndarray, rank: int, n_tokens: int
) -> tuple[str, ...]:
    found = []
    for value, column, what in ((n_tokens, "n_tokens", "tokens"), (rank, "rank", "rank")):
        probed = [int(number(cell, column)) for cell in cells]
        name = f"{value} tokens" if what == "tokens" else f"rank {value}"
        if value > max(probed):
            found.append(f"{name} is above everything probed (at most {max(probed)})")
        elif value < min(probed):
            found.append(f"{name} is below everything probed (at least {min(probed)})")
    lengths = np.array([number(cell, "n_tokens") for cell in cells])
    if not success[lengths >= n_tokens].any() and (lengths >= n_tokens).any():
        found.append(
            f"no cell of {n_tokens} tokens or more succeeded: the transition there is inferred "
            "from shorter targets"
        )
    if success[lengths <= n_tokens].all() and (lengths <= n_tokens).any():
        found.append(
            f"every cell of {n_tokens} tokens or fewer succeeded: the transition there is "
            "inferred from longer targets"
        )
    return tuple(found)
