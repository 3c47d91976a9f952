"""Objectives beside SFT: which cells make a pair, and the arithmetic of intervals."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from memlaw.probe.compare import MEASURES, at_the_edge, compare, paired, variant

MEASURED = {
    "n_records": 10,
    "recall": 0.5,
    "share_certified": 0.4,
    "token_accuracy": 0.9,
    "verbatim_prefix": 0.6,
    "share_under": 0.1,
    "nll": 0.3,
    "damage_nll": 0.01,
    "relapses_per_token": 0.2,
    "train_flop": 2e12,
    "certified": False,
    "steps_to_certificate": None,
}


def _row(objective="sft", seed=0, rank=1, **changes):
    return {
        "task": "phonebook",
        "recipe": "default",
        "placement": "down_proj",
        "layers": [20],
        "length": 132,
        "rank": rank,
        "seed": seed,
        "dtype": "bfloat16",
        "base_sha256": "b",
        "data_sha256": f"d{seed}",
        "learning_rate": 0.05,
        "batch_size": "auto",
        "total_steps": 150,
        "whiten": True,
        "retention": 1.0,
        "objective": objective,
        "on_empty": "skip",
        **MEASURED,
        **changes,
    }


def test_pairs_share_everything_but_the_objective():
    rows = [
        *(_row(seed=seed, recall=0.2 + seed / 10) for seed in (0, 1)),
        *(_row("triage", seed=seed, recall=0.6 + seed / 5) for seed in (0, 1)),
        _row("triage", seed=2),  # no such seed of sft
        _row("triage", seed=0, learning_rate=0.1, recall=0.0),  # another setting
        _row("memft_window", seed=0),
    ]
    found = compare(rows, "triage")
    assert (found.objective, found.baseline, found.n_seeds) == ("triage", "sft", 2)
    assert found.cells == [("phonebook", 132, 1)]
    recited = found.measures["records recited"]
    assert (recited.mean, recited.baseline_mean) == (pytest.approx(7.0), pytest.approx(2.5))
    assert compare(rows, "memft_curriculum") is None


def test_a_seed_counts_once_and_only_with_all_its_cells():
    rows = [
        _row(objective, seed=seed, rank=rank, recall=recall + rank / 10)
        for objective, recall in (("sft", 0.1), ("triage", 0.3))
        for seed, rank in itertools.product((0, 1, 2), (1, 2))
        if (objective, seed, rank) != ("triage", 2, 2)
    ]
    found = compare(rows, "triage")
    assert found.n_seeds == 2
    assert found.measures["records recited"].mean == pytest.approx(4.5)  # of ranks 1 and 2


def test_steps_are_compared_where_both_have_a_certificate():
    rows = [
        _row(seed=0, certified=True, steps_to_certificate=100),
        _row("triage", seed=0, certified=True, steps_to_certificate=80),
        _row(seed=1),
        _row("triage", seed=1, certified=True, steps_to_certificate=10),
    ]
    found = compare(rows, "triage")
    assert found.steps == (80, 100)
    assert found.certified == (2, 1, 2)


def test_the_edge_is_where_sft_recalls_something_but_not_all():
    rows = [
        _row(rank=rank, seed=seed, recall=share, token_accuracy=0.5)
        for rank, shares in ((1, (0.0, 0.02)), (2, (0.0, 0.2)), (3, (0.9, 1.0)), (4, (1.0, 1.0)))
        for seed, share in enumerate(shares)
    ]
    rows.append(_row("triage", rank=4, recall=0.5))
    assert at_the_edge(rows) == {("phonebook", 132, 2), ("phonebook", 132, 3)}
    one = [row | {"n_records": 1} for row in rows if row["rank"] == 1]
    assert at_the_edge(one) == {("phonebook", 132, 1)}  # by its tokens


def test_what_an_empty_batch_does_is_another_objective():
    assert variant(_row("memft_threshold", on_empty="sft")) == "memft_threshold:sft"
    assert variant(_row("memft_threshold")) == "memft_threshold"
    assert variant(_row("sft", on_empty="sft")) == "sft"


def test_an_interval_of_the_difference_is_students():
    values, baseline = [5.0, 7.0, 6.5, 8.0, 5.5], [4.0, 4.5, 5.0, 5.0, 4.2]
    found = paired(values, baseline)
    test = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(test.low), pytest.approx(test.high))


def test_an_interval_of_the_ratio_is_where_the_t_test_turns():
    y, x = np.array([5.0, 7.0, 6.5, 8.0, 5.5]), np.array([4.0, 4.5, 5.0, 5.0, 4.2])
    found = paired(y, x)
    assert found.ratio == pytest.approx(y.mean() / x.mean())

    def p(ratio):
        return stats.ttest_1samp(y - ratio * x, 0).pvalue - 0.05

    assert found.ratio_low == pytest.approx(optimize.brentq(p, 1.0, found.ratio))
    assert found.ratio_high == pytest.approx(optimize.brentq(p, found.ratio, 3.0))


def test_no_ratio_to_what_may_be_nothing():
    found = paired([5.0, 6.0, 7.0], [0.0, 0.0, 0.3])
    assert (found.ratio, found.ratio_low, found.ratio_high) == (None, None, None)
    assert found.low is not None
    assert paired([5.0], [0.0]).ratio is None


def test_one_seed_has_no_interval():
    found = paired([5.0], [4.0])
    assert (found.difference, found.ratio) == (1.0, 1.25)
    assert found.low is found.high is found.ratio_low is found.ratio_high is None


def test_intervals_cover_as_often_as_they_say():
    draw = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(2000):
        x = draw.normal(5, 1, 5)
        y = 1.5 * 5 + 0.8 * (x - 5) + draw.normal(0, 0.7, 5)
        found = paired(y, x)
        hits += (found.low <= 2.5 <= found.high, found.ratio_low <= 1.5 <= found.ratio_high)
    # a binomial of 2,000 at 0.95 has a standard deviation of 0.005
    assert np.all(np.abs(hits / 2000 - 0.95) < 0.02)


def test_every_measure_is_a_number_of_a_row():
    assert all(math.isfinite(measure(_row())) for measure in MEASURES.values())
