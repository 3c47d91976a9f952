"""The law: likelihood, intervals, what a grid can't tell, comparison, messages."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from scipy.stats import t as student

from memlaw.core.errors import MemlawError
from memlaw.law.comparison import compare, compare_cells
from memlaw.law.estimator import LawError
from memlaw.law.forms import FORMS
from memlaw.law.likelihood import Likelihood
from memlaw.law.memory_law import MemoryLaw
from memlaw.law.rows import cell_arrays, choose_cells, finished_cells, split_by_setting

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from law_coverage import PAPER, SCENARIOS, Scenario, synthetic_grid

GROUPED = SCENARIOS["paper-grouped"]
OF_FORM = {scenario.form: scenario for scenario in SCENARIOS.values()}
FAST = {"intervals": False}


def _cells(scenario=GROUPED, seed=0, **columns):
    X, y, censored, groups = synthetic_grid(scenario, seed)
    return [
        {
            "task": "noise:1.0",
            "rank": int(size),
            "n_parameters": int(2112 * size),
            "n_tokens": int(n_tokens),
            "seed": int(group.split("|")[1]),
            "base_nll": float(base),
            "delta_nll": float(delta),
            "saturated": bool(cut),
            **columns,
        }
        for (size, n_tokens, base), delta, cut, group in zip(X, y, censored, groups, strict=True)
    ]


# -- the likelihood


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_the_likelihoods(form, grouped):
    X, y, censored, groups = synthetic_grid(OF_FORM.get(form, GROUPED), 0)
    assert censored.any()
    likelihood = Likelihood(FORMS[form], X, y, censored, groups if grouped else None)
    at = likelihood.starts()[0] + 0.3 * likelihood.space.first_steps
    step = 1e-5 * likelihood.space.first_steps
    expected = [
        (likelihood(at + h)[0] - likelihood(at - h)[0]) / (2 * h.max()) for h in np.diag(step)
    ]
    np.testing.assert_allclose(likelihood(at)[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("omega", [0.0, 0.7, 3.0])
def test_the_likelihood_is_the_integral_over_the_shared_error(omega):
    X = np.array([[1, 64, 10], [2, 64, 10], [4, 64, 10], [8, 64, 10], [1, 128, 10], [2, 128, 10]])
    y = np.array([4.0, 5.2, 6.9, 9.5, 2.9, 3.6])
    censored = np.array([False, False, False, True, False, False])
    likelihood = Likelihood(FORMS["power"], X, y, censored, np.array(list("aaaabb")))
    sigma = 0.2
    at = np.array([math.log(4.3), 0.5, 0.6, math.log(sigma), omega])
    mean = likelihood.curve(at, X)

    def of_group(rows, e):
        found = norm.pdf(e)
        for i in rows:
            z = (y[i] - mean[i]) / sigma - omega * e
            found *= norm.sf(z) if censored[i] else norm.pdf(z) / sigma
        return found

    total = sum(
        math.log(quad(lambda e, rows=rows: of_group(rows, e), -12, 12, points=[-2, 0, 2])[0])
        for rows in ([0, 1, 2, 3], [4, 5])
    )
    assert likelihood(at)[0] == pytest.approx(-total, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_known_parameters_are_recovered(name):
    scenario = SCENARIOS[name]
    quiet = Scenario(scenario.form, scenario.truth, scenario.sigma / 100, scenario.tau / 100)
    law = MemoryLaw(scenario.form, **FAST).fit(*synthetic_grid(quiet, 1))
    assert law.params_ == pytest.approx(scenario.truth, rel=0.05, abs=0.02)
    assert law.r2_ > 0.9999


@pytest.mark.slow
def test_noise_is_split_into_a_cells_own_and_what_cells_on_the_same_data_share():
    found = np.array(
        [
            (law.sigma_, law.tau_)
            for law in (
                MemoryLaw(**FAST).fit(*synthetic_grid(SCENARIOS["paper-strongly-grouped"], seed))
                for seed in range(20)
            )
        ]
    ).mean(axis=0)
    assert found == pytest.approx([0.05, 0.12], rel=0.15)


def test_units_of_the_loss_only_scale_what_has_them():
    X, y, censored, groups = synthetic_grid(GROUPED, 3)
    nats = MemoryLaw().fit(X, y, censored, groups)
    bits = MemoryLaw().fit(X / [1, 1, math.log(2)], y / math.log(2), censored, groups)
    for name, unit in (("C", math.log(2)), ("b", math.log(2)), ("alpha", 1), ("beta", 1)):
        assert bits.params_[name] * unit == pytest.approx(nats.params_[name], rel=1e-3)
        ends = [end * unit for end in bits.intervals_[name]]
        assert ends == pytest.approx(nats.intervals_[name], rel=2e-2)


def test_parameters_for_a_covariate_change_c_alone():
    cells = _cells()
    by_rank = MemoryLaw().fit_cells(cells)
    by_parameters = MemoryLaw(covariate="parameters").fit_cells(cells)
    for name in ("alpha", "beta", "b"):
        assert by_parameters.params_[name] == pytest.approx(by_rank.params_[name], rel=1e-3)
    factor = 2112 ** by_rank.params_["alpha"]
    assert by_parameters.params_["C"] * factor == pytest.approx(by_rank.params_["C"], rel=1e-3)


# -- censoring


@pytest.mark.slow
def test_saturated_cells_bias_naive_fits_and_not_ours():
    truth = {"C": 80.0, "alpha": 0.5, "beta": 0.7}
    noisy = Scenario("power", truth, 0.8, 0.0)
    found = {"ours": [], "face value": [], "dropped": []}
    for seed in range(60):
        X, y, censored, _ = synthetic_grid(noisy, seed)
        free = ~censored
        law = MemoryLaw("power", **FAST)
        found["ours"].append(law.fit(X, y, censored).params_["alpha"])
        found["face value"].append(law.fit(X, y).params_["alpha"])
        found["dropped"].append(law.fit(X[free], y[free]).params_["alpha"])
    bias = {way: np.mean(alphas) - truth["alpha"] for way, alphas in found.items()}
    error = np.std(found["ours"]) / math.sqrt(60)
    assert abs(bias["ours"]) < 2.5 * error
    assert bias["dropped"] < -3 * error
    assert bias["face value"] < -5 * error


def test_a_censored_cell_says_so_much_or_more():
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    law = MemoryLaw(**FAST).fit(X, y, censored, groups)
    lower = MemoryLaw(**FAST).fit(X, np.where(censored, y - 3, y), censored, groups)
    assert law.n_censored_ == censored.sum() == 15
    # a bound that binds less changes little; the same move at face value would change a lot
    assert lower.params_ == pytest.approx(law.params_, rel=0.15)
    assert lower.log_likelihood_ >= law.log_likelihood_


# -- intervals


@pytest.mark.slow
def test_intervals_cover_the_truth_in_200_grids_as_often_as_they_say():
    hits = dict.fromkeys(PAPER, 0)
    for seed in range(1000, 1200):
        law = MemoryLaw().fit(*synthetic_grid(GROUPED, seed))
        for name, true in PAPER.items():
            low, high = law.intervals_[name]
            assert low < law.params_[name] < high
            hits[name] += low <= true <= high
    assert all(0.90 <= n / 200 <= 0.99 for n in hits.values()), hits


def test_a_profile_end_is_where_the_deviance_reaches_the_cutoff():
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    law = MemoryLaw().fit(X, y, censored, groups)
    at = law.intervals_["b"][1]
    # with b held there, ΔL − b is a pure power law: its own maximum is the profile
    fixed = MemoryLaw("power", **FAST).fit(X, y - at, censored, groups)
    n = law.n_effective_
    cutoff = n * math.log1p(student.ppf(0.975, n - 4) ** 2 / (n - 4))
    assert 15 < n < 60
    deviance = 2 * (law.log_likelihood_ - fixed.log_likelihood_)
    assert deviance == pytest.approx(cutoff, rel=0.05)


def test_errors_shared_by_data_widen_what_lengths_tell_and_narrow_what_sizes_tell():
    scenario = Scenario("power", SCENARIOS["power-grouped"].truth, 0.05, 0.12)
    X, y, censored, groups = synthetic_grid(scenario, 0)
    together = MemoryLaw("power").fit(X, y, censored, groups)
    apart = MemoryLaw("power").fit(X, y, censored)
    assert apart.tau_ == 0
    assert apart.n_effective_ == (~censored).sum()
    # at the true ρ, 0.85, 60 cells of 15 data sets would count as 17
    assert 15 <= together.n_effective_ < 20
    width = {n: [np.ptp(law.intervals_[n]) for law in (apart, together)] for n in together.params_}
    assert width["beta"][1] > 1.15 * width["beta"][0]
    assert width["alpha"][1] < 0.8 * width["alpha"][0]


def test_a_group_of_one_cell_each_is_no_group():
    X, y, censored, _ = synthetic_grid(GROUPED, 0)
    law = MemoryLaw(**FAST).fit(X, y, censored, groups=range(len(y)))
    assert law.tau_ == 0
    assert law.params_ == MemoryLaw(**FAST).fit(X, y, censored).params_


def test_a_wider_confidence_is_a_wider_interval():
    grid = synthetic_grid(GROUPED, 0)
    narrow, wide = (MemoryLaw(confidence=c).fit(*grid).intervals_ for c in (0.8, 0.99))
    for name in PAPER:
        assert wide[name][0] < narrow[name][0] < narrow[name][1] < wide[name][1]


# -- what a grid can't tell


def test_a_good_grid_has_nothing_to_warn_of():
    law = MemoryLaw().fit(*synthetic_grid(GROUPED, 0))
    assert law.identifiability_.ok
    assert law.identifiability_.unbounded == ()
    assert all(math.isfinite(end) for ends in law.intervals_.values() for end in ends)
    assert law.identifiability_.condition_number < 300


def test_a_straight_line_in_logarithms_leaves_b_open():
    X, _, _, groups = synthetic_grid(GROUPED, 0)
    noise = 0.1 * np.random.default_rng(0).normal(size=len(X))
    law = MemoryLaw().fit(X, 10 + np.log(X[:, 0]) - 1.3 * np.log(X[:, 1]) + noise, None, groups)
    found = law.identifiability_
    assert not found.ok
    assert {"C", "alpha", "beta", "b"} <= set(found.unbounded)
    assert law.intervals_["b"][0] == -math.inf
    assert law.intervals_["C"][1] == math.inf
    assert law.intervals_["beta"][0] == 0
    assert "can't tell alpha and beta from b" in found.statements[0]
    assert law.r2_ > 0.99  # it predicts well all the same


def test_a_narrow_grid_cannot_tell_beta_from_b():
    X = np.array([[r, n, 11.0] for r in (2, 3) for n in (100, 128, 150) for _ in range(3)])
    y = 60 * X[:, 0] ** 0.5 * X[:, 1] ** -0.6 - 0.5
    law = MemoryLaw().fit(X, y + 0.1 * np.random.default_rng(1).normal(size=len(X)))
    found = law.identifiability_
    assert any("can't tell beta from b" in statement for statement in found.statements)
    assert found.correlations["beta", "b"] > 0.99
    assert found.condition_number > 300


def test_a_knee_that_no_cell_shows_is_open():
    grid = synthetic_grid(SCENARIOS["power-grouped"], 0)
    X, y, censored, groups = grid
    low = y < 6
    law = MemoryLaw("knee").fit(X[low], y[low], censored[low], groups[low])
    assert law.intervals_["k"][1] == math.inf
    assert "k" in law.identifiability_.unbounded
    assert "beta" not in law.identifiability_.unbounded


# -- prediction and comparison


def test_a_prediction_never_exceeds_what_there_is():
    law = MemoryLaw(**FAST).fit(*synthetic_grid(GROUPED, 0))
    X = [[64, 32, 10.0], [1, 256, 10.0]]
    assert law.curve(X)[0] > 10
    assert law.predict(X)[0] == 10
    assert law.predict(X)[1] == law.curve(X)[1] < 10


def test_the_curve_is_the_equation():
    X = np.array([[2.0, 100.0, 9.0], [6.0, 50.0, 9.0]])
    laws = {form: MemoryLaw(form, **FAST).fit(*synthetic_grid(s, 0)) for form, s in OF_FORM.items()}
    for form, law in laws.items():
        p = {"alpha": 1.0, "beta": 1.0} | law.params_
        q, base = p["C"] * X[:, 0] ** p["alpha"] * X[:, 1] ** -p["beta"], X[:, 2]
        expected = {
            "paper": lambda q=q, p=p: q + p["b"],
            "power": lambda q=q: q,
            "saturating": lambda q=q, base=base: base * (1 - np.exp(-q / base)),
            "knee": lambda q=q, p=p, base=base: (q ** -p["k"] + base ** -p["k"]) ** (-1 / p["k"]),
            "ceiling": lambda q=q, p=p, base=base: (
                p["b"] + (q ** -p["k"] + (base - p["b"]) ** -p["k"]) ** (-1 / p["k"])
            ),
        }
        expected["capacity"] = expected["knee"]
        np.testing.assert_allclose(law.curve(X), expected[form](), rtol=1e-9)
    assert set(laws) == set(FORMS)


def test_score_is_r2():
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    law = MemoryLaw(**FAST).fit(X, y, censored, groups)
    free = ~censored
    residual = y[free] - law.predict(X[free])
    by_hand = 1 - (residual**2).sum() / ((y[free] - y[free].mean()) ** 2).sum()
    assert law.score(X[free], y[free]) == pytest.approx(by_hand, rel=1e-12)
    assert law.r2_ == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["power-grouped", "capacity-grouped", "saturating-grouped"])
def test_the_true_form_wins_the_comparison(name):
    results = compare(*synthetic_grid(SCENARIOS[name], 2))
    best = results[0]
    # a form that holds the true one as a special case may come out level with it
    nested = {"power": {"paper", "knee"}, "capacity": {"knee"}, "saturating": {"ceiling"}}
    true = SCENARIOS[name].form
    assert best.form == true or (best.form in nested[true] and _of(results, true).delta_aicc < 4)
    assert best.delta_aicc == 0
    assert _of(results, true).held_out_length_error < 0.05
    assert _of(results, true).r2 > 0.99


def _of(results, form):
    return next(result for result in results if result.form == form)


def test_held_out_errors_are_of_cells_the_fit_has_not_seen():
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    (result,) = compare(X, y, censored, groups, forms=["paper"])
    for column, found in ((1, result.held_out_length_error), (0, result.held_out_size_error)):
        held = X[:, column] == X[:, column].max()
        law = MemoryLaw(**FAST).fit(X[~held], y[~held], censored[~held], groups[~held])
        asked = held & ~censored
        error = np.abs(law.predict(X[asked]) - y[asked]) / y[asked]
        assert found == pytest.approx(np.median(error), rel=1e-6)


def test_what_cannot_be_held_out_is_none():
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    two = np.isin(X[:, 1], (128, 192)) & ~censored
    (result,) = compare(X[two], y[two], None, groups[two], forms=["power"])
    assert result.held_out_length_error is None
    assert result.held_out_size_error is not None


# -- cells


def test_cells_become_arrays():
    cells = _cells()
    X, y, censored, groups = cell_arrays(cells)
    expected = synthetic_grid(GROUPED, 0)
    np.testing.assert_array_equal(X, expected[0])
    np.testing.assert_array_equal(y, expected[1])
    np.testing.assert_array_equal(censored, expected[2])
    assert len(set(groups)) == 15
    assert compare_cells(cells, forms=["power"]) == compare(*cell_arrays(cells), forms=["power"])


def test_failed_cells_are_left_out():
    cells = _cells(status="success")
    assert choose_cells([*cells, {"task": "noise:1.0", "status": "failed"}]) == cells


def test_cells_are_split_by_setting_in_the_order_of_its_first_cell():
    cells = [
        {"task": "phonebook", "rank": 1},
        {"task": "noise:1", "layers": [20], "rank": 1},
        {"task": "phonebook", "rank": 2, "steps": None},
        {"task": "noise:1", "layers": [24], "rank": 1},
        {"task": "phonebook", "rank": 3, "recipe": "paper", "status": "failed"},
    ]
    groups = split_by_setting(cells)
    assert list(groups.values()) == [
        [cells[0], cells[2]],
        *([cell] for cell in cells[1::2]),
        cells[4:],
    ]
    assert [json.loads(key)[:2] for key in groups] == [
        ["phonebook", None],
        ["noise:1", None],
        ["noise:1", None],
        ["phonebook", "paper"],
    ]
    assert split_by_setting(finished_cells(cells)).keys() < groups.keys()


def test_mixed_settings_must_be_chosen_from():
    cells = _cells() + _cells(task="phonebook")
    with pytest.raises(LawError, match=r'several values of task: "noise:1.0", "phonebook".*where='):
        MemoryLaw().fit_cells(cells)
    chosen = choose_cells(cells, {"task": "phonebook"})
    assert len(chosen) == 75
    with pytest.raises(LawError, match=r"No cell has task 'poems'; there are \"noise:1.0\""):
        choose_cells(cells, {"task": "poems"})


def test_cells_of_files_that_share_a_name_are_not_points_of_one_law():
    cell = {"task": "records:r.jsonl", "n_tokens": 14, "seed": 0, "data_sha256": "a"}
    cells = [{**cell, "rank": rank} for rank in (1, 2)]
    assert choose_cells([*cells, {**cell, "n_tokens": 28, "data_sha256": "b"}])
    assert choose_cells([*cells, {**cell, "rank": 3, "data_sha256": None}])  # it isn't on record
    with pytest.raises(LawError, match="n_tokens 14, seed 0 were trained on different data"):
        choose_cells([*cells, {**cell, "rank": 1, "data_sha256": "b"}])
    placed = _cells(layers=[20]) + _cells(layers=[24])
    with pytest.raises(LawError, match="several values of layers"):
        MemoryLaw().fit_cells(placed)


# -- messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "cubic"}, "There is no form 'cubic'; there are paper, power"),
        ({"confidence": 1.5}, "confidence is 1.5; it must lie between 0 and 1"),
        ({"X": [[1, 2]]}, r"X has shape \(1, 2\); it must be \[n, 3\]"),
        ({"X0": 0.0}, "Row 0 of X is .*finite and above 0"),
        ({"y0": math.nan}, "y is nan in row 0; leave out"),
        ({"y": [1.0]}, r"y has shape \(1,\)"),
        ({"censored": [True]}, r"censored has shape \(1,\)"),
        ({"groups": ["a"]}, r"groups has shape \(1,\)"),
        ({"censored": [True] * 75}, "needs at least 6 cells that aren't saturated; there are 0"),
        ({"one_length": True}, "All cells that aren't saturated have the same n_tokens, 128"),
        ({"one_size": True}, "the same size, 2"),
    ],
)
def test_messages_say_what_and_the_mend(change, message):
    X, y, censored, groups = synthetic_grid(GROUPED, 0)
    settings = {k: change[k] for k in ("form", "confidence") if k in change}
    X, y = change.get("X", X), change.get("y", y)
    if "X0" in change:
        X[0, 0] = change["X0"]
    if "y0" in change:
        y[0] = change["y0"]
    if "one_length" in change:
        X[:, 1] = 128
    if "one_size" in change:
        X[:, 0] = 2
    with pytest.raises(MemlawError, match=message):
        MemoryLaw(**settings).fit(
            X, y, change.get("censored", censored), change.get("groups", groups)
        )


def test_a_missing_column_is_named_with_its_cell():
    cells = _cells()
    del cells[7]["delta_nll"]
    with pytest.raises(LawError, match=r"The cell \(task noise:1.0, rank 3, .*has no delta_nll"):
        MemoryLaw().fit_cells(cells)
    with pytest.raises(LawError, match="covariate is 'width'; it must be one of rank, parameters"):
        MemoryLaw(covariate="width").fit_cells(_cells())
    with pytest.raises(LawError, match="no finished cell among 0"):
        MemoryLaw().fit_cells([])


def test_predicting_needs_a_fit():
    with pytest.raises(LawError, match="call fit first"):
        MemoryLaw().predict([[1, 2, 3]])


# -- manners


def test_parameters_are_got_and_set():
    law = MemoryLaw("knee", covariate="parameters")
    expected = {"form": "knee", "covariate": "parameters", "confidence": 0.95, "intervals": True}
    assert law.get_params() == expected
    assert law.set_params(form="power", confidence=0.9) is law
    assert law.form == "power"
    assert repr(law) == (
        "MemoryLaw(form='power', covariate='parameters', confidence=0.9, intervals=True)"
    )
    with pytest.raises(LawError, match="no parameter 'forms'; it has form, covariate"):
        law.set_params(forms="power")


def test_scikit_learn_clones_it():
    base = pytest.importorskip("sklearn.base")
    law = MemoryLaw("knee", confidence=0.9).fit(*synthetic_grid(GROUPED, 0))
    copy = base.clone(law)
    assert copy.get_params() == law.get_params()
    assert not hasattr(copy, "params_")


def test_fitting_and_planning_need_no_torch():
    script = (
        "import sys, memlaw.law.memory_law, memlaw.law.recall_law, memlaw.law.plan; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_docstrings_example_runs():
    import doctest

    from memlaw.law import memory_law

    result = doctest.testmod(memory_law)
    assert (result.failed, result.attempted) == (0, 5)
