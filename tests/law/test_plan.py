"""Recall laws and the planner: thresholds, separation, what is recommended, messages."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, ndtr

import memlaw
from memlaw.law.builtin import builtin_cells, plan_by_builtin
from memlaw.law.estimator import LawError
from memlaw.law.plan import plan_rank, plan_tokens
from memlaw.law.recall_law import RecallLaw, reached
from memlaw.law.recall_posterior import SLIP, brackets_of
from memlaw.law.share_law import ShareLaw
from memlaw.writer import setup as writer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from law_coverage import LENGTHS, RANKS, Thresholds, random_thresholds, synthetic_store

# A rank holds 42 tokens; ℓ0 of the grid is 109.
SHARP = Thresholds(size_at_centre=2.6, gamma=1.0, bend=0.0, spread=1e-6)
USUAL = Thresholds(size_at_centre=2.6, gamma=1.0, bend=0.0, spread=0.1)


def _store(truth=SHARP, seed=0):
    return synthetic_store(truth, np.random.default_rng(seed))


# -- P(certified)


def test_complete_separation_gives_finite_honest_answers():
    law = RecallLaw().fit_cells(_store())
    assert law.n_contradictions_ == 0
    assert law.n_groups_ == 15
    for low, high in law.intervals_.values():
        assert math.isfinite(low)
        assert math.isfinite(high)
        assert low < high
    assert law.intervals_["size_at_centre"][0] < 2.6 < law.intervals_["size_at_centre"][1]
    assert law.intervals_["gamma"][0] < 1.0 < law.intervals_["gamma"][1]
    low, high = law.intervals_["size_at_centre"]
    assert high / low < 1.5  # the gaps between ranks are 1.33 to 2


def test_probability_rises_with_size_and_falls_with_length():
    law = RecallLaw().fit_cells(_store(USUAL))
    by_rank = law.probability([[r, 128] for r in range(1, 9)])
    by_length = law.probability([[3, n] for n in range(32, 257, 16)])
    assert (np.diff(by_rank) > 0).all()
    assert (np.diff(by_length) < 0).all()
    assert by_rank[0] < 0.05
    assert by_rank[-1] > 0.98
    low, high = law.probability_interval([[r, 128] for r in range(1, 9)]).T
    assert (low < high).all()
    inside = (by_rank > 0.05) & (by_rank < 0.99)
    assert inside.sum() >= 2
    assert ((low < by_rank) & (by_rank < high))[inside].all()
    np.testing.assert_allclose(
        law.predict_proba([[3, 128]]), [[1 - by_rank[2], by_rank[2]]], rtol=1e-9
    )


def test_size_quantile_inverts_probability():
    law = RecallLaw().fit_cells(_store(USUAL))
    for p in (0.05, 0.5, 0.9, 0.99):
        size = law.size_quantile(150, p)
        assert law.probability([[size, 150]])[0] == pytest.approx(p, abs=1e-6)


def test_the_likelihood_sums_over_the_gaps():
    # sizes 1, 2, 4 of one data set: failed, certified, failed (one contradiction)
    X, hits = np.array([[1.0, 64], [2.0, 64], [4.0, 64]]), np.array([False, True, False])
    law = RecallLaw().fit(X, hits, ["a"] * 3)
    brackets = brackets_of(np.log(X), hits, np.array(["a"] * 3))
    phi = ndtr((brackets.pairs[:, 0] - math.log(2.5)) / 0.4)
    found = float(brackets.rest[0] + brackets.weights[0] @ phi)
    s, r = SLIP, 1 - SLIP
    wrong = (s * r * s, r * r * s, r * s * s, r * s * r)  # threshold under 1, to 2, to 4, above
    gaps = np.diff([0.0, *phi, 1.0])
    assert found == pytest.approx(float(np.dot(wrong, gaps)), rel=1e-12)
    assert law.n_contradictions_ == 1


def test_one_odd_cell_does_not_move_the_law():
    cells = _store()
    clean = RecallLaw().fit_cells(cells)
    odd = next(c for c in cells if c["rank"] == 6 and c["n_tokens"] == 64)
    odd["certified"] = False
    law = RecallLaw().fit_cells(cells)
    assert law.n_contradictions_ == 1
    ratio = law.size_quantile(64, 0.9) / clean.size_quantile(64, 0.9)
    assert 0.9 < ratio < 1.15


def test_data_shared_by_cells_counts_once():
    X = np.array([[r, n] for n in (64, 128) for r in (1, 2, 4)], dtype=float)
    hits = X[:, 0] * 50 > X[:, 1]
    groups = X[:, 1]
    once = RecallLaw().fit(X, hits, groups)
    apart = RecallLaw().fit(X, hits)
    assert (once.n_groups_, apart.n_groups_) == (2, 6)
    assert np.ptp(once.intervals_["spread"]) > 0
    assert once.score(X, hits) == 1.0


@pytest.mark.slow
def test_intervals_of_the_law_are_calibrated_over_100_random_laws():
    hits = dict.fromkeys(("size_at_centre", "gamma", "spread"), 0)
    done = seed = 0
    while done < 100:
        rng = np.random.default_rng(5000 + seed)
        seed += 1
        truth = random_thresholds(rng)
        cells = synthetic_store(truth, rng)
        if len({cell["certified"] for cell in cells}) < 2:
            continue
        done += 1
        law = RecallLaw().fit_cells(cells)
        for name in hits:
            low, high = law.intervals_[name]
            hits[name] += low <= getattr(truth, name) <= high
    # 88 of 100 or fewer has probability 0.004 at 95 %
    assert all(n >= 89 for n in hits.values()), hits


@pytest.mark.parametrize(("certified", "message"), [(True, "Every cell"), (False, "No cell")])
def test_a_grid_without_a_transition_is_refused(certified, message):
    with pytest.raises(LawError, match=f"{message} certifies: the grid has no transition"):
        RecallLaw().fit([[1, 64], [2, 64]], [certified] * 2)


def test_messages_of_recall_law():
    with pytest.raises(LawError, match=r"X has shape \(2,\)"):
        RecallLaw().fit([1, 2], [True, False])
    with pytest.raises(LawError, match="Row 1 of X"):
        RecallLaw().fit([[1, 2], [0, 2]], [True, False])
    with pytest.raises(LawError, match="certified has shape"):
        RecallLaw().fit([[1, 2]], [True, False])
    with pytest.raises(LawError, match="group 'a' differ in n_tokens"):
        RecallLaw().fit([[1, 2], [2, 3]], [False, True], ["a", "a"])
    with pytest.raises(LawError, match="call fit first"):
        RecallLaw().probability([[1, 2]])


# -- the share of tokens under the line


def _shares(seed=0, noise=0.2):
    X = np.array([[r, n] for n in LENGTHS for _ in range(3) for r in RANKS], dtype=float)
    groups = np.arange(len(LENGTHS) * 3).repeat(len(RANKS))
    rng = np.random.default_rng(seed)
    eta = -6 - 2 * np.log(X[:, 0]) + 1.5 * np.log(X[:, 1])
    shared = rng.normal(size=15).repeat(5)
    return X, expit(eta + noise * (shared + rng.normal(size=75))), groups


def test_share_law_recovers_known_parameters():
    X, share, groups = _shares(noise=0.0)
    law = ShareLaw().fit(X, share, groups)
    assert law.params_ == pytest.approx({"a": -6, "b": 2, "c": 1.5}, rel=0.03)
    np.testing.assert_allclose(law.predict(X), share, atol=0.01)
    assert law.r2_ > 0.999


def test_share_law_counts_data_sets_not_cells():
    X, share, groups = _shares(noise=0.4)
    together, apart = ShareLaw().fit(X, share, groups), ShareLaw().fit(X, share)
    assert together.params_ == apart.params_
    assert np.ptp(together.intervals_["c"]) > 1.3 * np.ptp(apart.intervals_["c"])


def test_share_law_stays_finite_when_all_is_nought_or_one():
    X, share, groups = _shares(noise=0.0)
    law = ShareLaw().fit(X, np.round(share), groups)
    assert all(math.isfinite(v) and abs(v) < 200 for v in law.params_.values())
    assert law.params_["b"] > 0
    assert law.predict([[6, 32]])[0] < 0.01
    assert law.predict([[1, 256]])[0] > 0.9


def test_share_law_reads_cells_and_refuses_what_it_cannot_use():
    cells = _store(USUAL)
    law = ShareLaw().fit_cells(cells)
    assert law.predict([[6, 32]])[0] < law.predict([[1, 256]])[0]
    with pytest.raises(LawError, match="between 0 and 1"):
        ShareLaw().fit([[1, 2], [2, 3]], [0.5, 1.5])
    with pytest.raises(LawError, match="2 data sets; intervals need at least 4"):
        ShareLaw().fit([[1, 2], [2, 3]], [0.5, 0.6])
    with pytest.raises(LawError, match="same size"):
        ShareLaw().fit([[1, 2], [1, 3], [1, 4], [1, 5]], [0.1, 0.2, 0.3, 0.4])
    for share in (0.0, 1.0):  # no interval follows from shares that never change
        with pytest.raises(LawError, match=f"All shares are {share:g}"):
            ShareLaw().fit([[1, 2], [2, 3], [1, 4], [2, 5]], [share] * 4)


# -- the planner


@pytest.mark.slow
@pytest.mark.parametrize("truth", [SHARP, USUAL, Thresholds(2.0, 0.7, 0.1, 0.05)])
def test_the_recommended_rank_holds_and_half_of_it_does_not(truth):
    """Of twelve requests at least ten hold, and at least eight halves don't."""
    cells = _store(truth, seed=7)
    rng = np.random.default_rng(11)
    hold = fail = 0
    for n_tokens in np.exp(rng.uniform(math.log(56), math.log(250), size=12)).round().astype(int):
        plan = plan_rank(cells, int(n_tokens))
        threshold = math.exp(truth.draw(rng.normal(), n_tokens))
        hold += plan.rank >= threshold
        fail += plan.rank // 2 < threshold
        assert plan.probability >= 0.9
        assert plan.rank_interval[0] <= plan.rank <= plan.rank_interval[1]
    assert hold >= 10
    assert fail >= 8


@pytest.mark.slow
def test_the_plan_is_the_smallest_rank_with_the_probability_asked():
    cells = _store(USUAL)
    law = RecallLaw().fit_cells(cells)
    for confidence in (0.5, 0.9, 0.99):
        plan = plan_rank(cells, 150, confidence=confidence)
        assert law.probability([[plan.rank, 150]])[0] >= confidence
        assert law.probability([[plan.rank - 1, 150]])[0] < confidence
        assert plan.probability_at_half == pytest.approx(
            law.probability([[plan.rank // 2, 150]])[0]
        )
    assert plan_rank(cells, 10).rank == 1
    assert plan_rank(cells, 10).probability_at_half is None


def test_what_a_plan_costs():
    plan = plan_rank(_store(), 150)
    assert plan.n_parameters == 2112 * plan.rank
    assert plan.adapter_mb == pytest.approx(4 * 2112 * plan.rank / 1e6)
    assert plan.train_s == pytest.approx(0.5 * 150**0.5 * plan.rank**0.2, rel=1e-6)
    cells = [{**cell, "wall_s": None} for cell in _store()]
    assert plan_rank(cells, 150).train_s is None


def test_inside_the_grid_there_is_nothing_to_warn_of():
    assert plan_rank(_store(), 150).extrapolates == ()
    assert plan_tokens(_store(), 3).extrapolates == ()


@pytest.mark.parametrize(
    ("n_tokens", "words"),
    [
        (400, ["400 tokens is above everything probed (at most 256)", "probed (at most 6)"]),
        (16, ["16 tokens is below everything probed (at least 32)"]),
        (35, ["every cell of 35 tokens or fewer succeeded"]),
    ],
)
def test_extrapolation_is_said_in_words(n_tokens, words):
    said = plan_rank(_store(), n_tokens).extrapolates
    for word in words:
        assert any(word in line for line in said), said


def test_a_length_at_which_nothing_succeeded_is_said():
    cells = [c for c in _store() if c["rank"] <= 3]
    said = plan_rank(cells, 200).extrapolates
    assert any("no cell of 200 tokens or more succeeded" in line for line in said)
    assert any("is above everything probed (at most 3)" in line for line in said)


@pytest.mark.slow
def test_tokens_are_the_inverse_of_rank():
    cells = _store(USUAL)
    for rank in (2, 3, 4, 6):
        plan = plan_tokens(cells, rank)
        assert plan.probability >= 0.9
        assert plan_rank(cells, plan.n_tokens).rank <= rank
        assert plan_rank(cells, plan.n_tokens + 1).rank > rank
        assert plan.tokens_interval[0] <= plan.n_tokens <= plan.tokens_interval[1]
        # the truth is 42 tokens a rank, give or take a tenth
        assert 0.6 * 42 * rank < plan.n_tokens < 42 * rank
        assert plan.n_parameters == 2112 * rank


def test_only_allowed_ranks_are_recommended():
    cells = _store()
    assert plan_rank(cells, 100).rank == 3
    assert plan_rank(cells, 100, ranks=[1, 2, 4, 8]).rank == 4
    with pytest.raises(LawError, match=r"rank 3 is needed. The largest allowed, 2, succeeds with"):
        plan_rank(cells, 100, ranks=[1, 2])
    with pytest.raises(LawError, match="whole numbers from 1"):
        plan_rank(cells, 100, ranks=[])


def test_recall_under_one_is_a_share_of_records_or_of_tokens():
    cells = _store()
    for cell in cells:
        ratio = cell["rank"] * 42 / cell["n_tokens"]
        cell["recall"] = min(1.0, ratio)
        cell["share_under"] = max(0.0, 0.5 - ratio / 2)
    full = plan_rank(cells, 200)
    records = plan_rank(cells, 200, recall=0.5)
    tokens = plan_rank(cells, 200, recall=0.7, measure="tokens")
    assert full.goal == "certified: every token at p 0.55 or more, teacher-forced"
    assert records.goal == "at least 0.5 of the records recited word for word"
    assert tokens.goal == "at least 0.7 of the target tokens over the line"
    assert tokens.rank <= records.rank < full.rank
    assert reached(cells, 0.5).sum() == sum(c["recall"] >= 0.5 for c in cells)


def test_mixed_cells_are_refused_until_one_setting_is_chosen():
    cells = _store() + [{**cell, "task": "phonebook"} for cell in _store()]
    with pytest.raises(LawError, match="several values of task"):
        plan_rank(cells, 100)
    assert plan_rank(cells, 100, where={"task": "phonebook"}) == plan_rank(_store(), 100)
    uneven = [{**c, "n_parameters": c["n_parameters"] + 500 * (c["rank"] == 6)} for c in _store()]
    with pytest.raises(LawError, match="parameters a rank go from 2112"):
        plan_rank(uneven, 100)


def test_a_store_without_a_transition_says_what_to_probe():
    none = [{**cell, "certified": False} for cell in _store()]
    with pytest.raises(
        LawError, match=r"None of 75 cells \(ranks 1 to 6, 32 to 256 tokens\) succeeds"
    ):
        plan_rank(none, 100)
    every = [{**cell, "certified": True} for cell in _store()]
    with pytest.raises(LawError, match=r"All 75 cells .* Probe smaller ranks or longer targets"):
        plan_tokens(every, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 0}, "n_tokens is 0; it must be 1 or more"),
        ({"confidence": 1.0}, "confidence is 1; it must lie between 0 and 1"),
        ({"recall": 0.0}, "recall is 0; it must be above 0, and 1 at most"),
        (
            {"measure": "letters", "recall": 0.5},
            "measure is 'letters'; it must be records",
        ),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    settings = {"n_tokens": 100, **change}
    with pytest.raises(LawError, match=message):
        plan_rank(_store(), **settings)


# -- the built-in table


def _builtin(task="phonebook"):
    return [cell for cell in builtin_cells() if cell["task"] == task]


def _loss(task):
    return float(np.mean([cell["base_nll"] for cell in _builtin(task)]))


@pytest.mark.parametrize("task", ["phonebook", "noise:1"])
def test_the_built_in_table_plans_for_data_like_its_own(task):
    cell = _builtin(task)[0]
    plan = plan_by_builtin(cell["base_sha256"], cell["sites"], 165, 1.1 * _loss(task))
    assert plan == plan_rank(_builtin(task), 165)


@pytest.mark.parametrize(
    "change",
    [
        {"base_sha256": "0" * 64},
        {"sites": ["model.layers.3.mlp.down_proj"]},
        {"sites": []},
        {"n_tokens": 5000},  # more than was probed
        {"base_nll": 0.0},
        {"base_nll": math.nan},
        {"base_nll": 50.0},  # like none of the tasks
        {"base_nll": 0.05},
    ],
)
def test_the_built_in_table_is_silent_on_anything_else(change):
    cell = _builtin()[0]
    asked = {
        "base_sha256": cell["base_sha256"],
        "sites": cell["sites"],
        "n_tokens": 165,
        "base_nll": _loss("phonebook"),
    }
    assert plan_by_builtin(**asked) is not None
    assert plan_by_builtin(**asked | change) is None


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "warned"), [(1, True), (2, True), (3, False), (4, False)])
def test_write_says_that_a_rank_is_small(llama, phone_book, tmp_path, monkeypatch, rank, warned):
    asked, said = [], []
    plan = plan_rank(_builtin(), 165)
    assert plan.rank == 3
    monkeypatch.setattr(writer, "plan_by_builtin", lambda *args: asked.append(args) or plan)

    class Notes(memlaw.Observer):
        def notice(self, text):
            said.append(text)

    settings = {"model": str(llama), "layers": 1, "max_epochs": 1, "retention": 0} | {
        "specificity": False
    }
    made = memlaw.write(phone_book, tmp_path / "out", rank=rank, observer=Notes(), **settings)
    assert made.rank == rank
    warning = f"Rank {rank} is small for this: 3 is expected to hold it after 150 steps (95 %: 2 to"
    assert any(line.startswith(warning) for line in said) == warned
    ((sha256, sites, n_tokens, nll),) = asked
    assert sha256 == made.certificate.base_sha256
    assert sites == ["model.layers.1.mlp.down_proj"]
    assert n_tokens == len(made.audit.tokens.p)
    bare = memlaw.audit(phone_book, model=str(llama), dtype="float32").nll_nats
    assert nll == pytest.approx(bare, rel=1e-4)


@pytest.mark.slow
def test_a_rank_left_to_write_is_no_less_than_the_plans(llama, tmp_path, monkeypatch):
    record = [("a", "b")]  # so little that rank 1 has room to spare
    settings = {"model": str(llama), "max_epochs": 1, "retention": 0} | {"specificity": False}
    assert memlaw.write(record, tmp_path / "bare", **settings).rank < 3
    plan = plan_rank(_builtin(), 165)
    monkeypatch.setattr(writer, "plan_by_builtin", lambda *_: plan)
    assert memlaw.write(record, tmp_path / "planned", **settings).rank == 3


def test_a_rank_that_holds_nothing_is_said():
    with pytest.raises(LawError, match="rank is 0; it must be 1 or more"):
        plan_tokens(_store(), 0)
