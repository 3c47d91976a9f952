"""How often the law's 95 % intervals cover the truth, on synthetic grids where it is known.

    python benchmarks/law_coverage.py                      # everything: about ten minutes
    python benchmarks/law_coverage.py paper-grouped plan   # some of it; the rest is kept

A grid is 5 ranks × 5 lengths × 3 seeds; cells of one length and seed share their data, and in the
grouped scenarios an error. In the nested ones shorter data are beginnings of longer ones of their
seed, as a probe's are, so that these errors go together, by √(shorter / longer). Cells whose ΔL
passes 97 % of L0 (99 % under a form with a ceiling) are saturated: they say no more than that. Each
grid has a seed of its own, so that all scenarios and all readers see the same. No model is trained.
Results go to `results/law_coverage.json`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from memlaw.law.forms import FORMS
from memlaw.law.memory_law import MemoryLaw
from memlaw.law.plan import plan_rank
from memlaw.law.recall_law import RecallLaw
from memlaw.law.share_law import ShareLaw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "law_coverage.json"
RANKS, LENGTHS, SEEDS = (1, 2, 3, 4, 6), (32, 64, 128, 192, 256), (0, 1, 2)
BASE_NLL = 10.0
N_GRIDS = 400
N_STORES = 100


@dataclass(frozen=True)
class Scenario:
    """A true law, and its noise in nats."""

    form: str
    truth: dict[str, float]
    sigma: float
    tau: float
    nested: bool = False


PAPER = {"C": 60.0, "alpha": 0.5, "beta": 0.6, "b": -0.5}
SCENARIOS = {
    "paper-independent": Scenario("paper", PAPER, 0.1, 0.0),
    "paper-grouped": Scenario("paper", PAPER, 0.08, 0.08),
    "paper-strongly-grouped": Scenario("paper", PAPER, 0.05, 0.12),
    "power-grouped": Scenario("power", {"C": 80.0, "alpha": 0.5, "beta": 0.7}, 0.08, 0.08),
    "power-strongly-grouped": Scenario("power", {"C": 80.0, "alpha": 0.5, "beta": 0.7}, 0.05, 0.12),
    "paper-nested": Scenario("paper", PAPER, 0.05, 0.12, nested=True),
    "power-nested": Scenario(
        "power", {"C": 80.0, "alpha": 0.5, "beta": 0.7}, 0.05, 0.12, nested=True
    ),
    "saturating-grouped": Scenario(
        "saturating", {"C": 200.0, "alpha": 0.6, "beta": 0.6}, 0.08, 0.08
    ),
    "knee-grouped": Scenario("knee", {"C": 80.0, "alpha": 0.6, "beta": 0.6, "k": 4.0}, 0.08, 0.08),
    "capacity-grouped": Scenario("capacity", {"C": 250.0, "k": 4.0}, 0.08, 0.08),
    "ceiling-grouped": Scenario(
        "ceiling", {"C": 80.0, "alpha": 0.7, "beta": 0.65, "b": 0.5, "k": 4.0}, 0.08, 0.08
    ),
}


def of_data(rng: np.random.Generator, nested: bool) -> np.ndarray:
    """A standard normal number for each length and seed: [5, 3]."""
    drawn = rng.normal(size=(len(LENGTHS), len(SEEDS)))
    if not nested:
        return drawn
    n = np.array(LENGTHS, dtype=float)
    together = np.sqrt(np.minimum.outer(n, n) / np.maximum.outer(n, n))  # of means over tokens
    return np.linalg.cholesky(together) @ drawn


def synthetic_grid(
    scenario: Scenario, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One grid: X [75, 3], y [75] nats, censored [75], groups [75]."""
    rng, form, truth = np.random.default_rng(seed), FORMS[scenario.form], scenario.truth
    cells = [(r, n, BASE_NLL, f"{n}|{s}") for n in LENGTHS for s in SEEDS for r in RANKS]
    X = np.array([cell[:3] for cell in cells], dtype=float)
    groups = np.array([cell[3] for cell in cells])
    log_q = math.log(truth["C"]) + truth.get("alpha", 1.0) * np.log(X[:, 0])
    log_q = log_q - truth.get("beta", 1.0) * np.log(X[:, 1])
    extras = np.array([math.log(truth[p]) if p == "k" else truth[p] for p in form.extras])
    shared = of_data(rng, scenario.nested).ravel().repeat(len(RANKS))
    y = form.curve(log_q, X[:, 2], extras)[0]
    y = y + scenario.tau * shared + scenario.sigma * rng.normal(size=len(X))
    line = (0.99 if form.bounded else 0.97) * BASE_NLL
    return X, np.minimum(y, line), y > line, groups


Fit = Callable[[MemoryLaw, np.ndarray, np.ndarray, np.ndarray, np.ndarray], MemoryLaw]
INDEPENDENT = "errors taken for independent"
AS_IT_IS: dict[str, Fit] = {"memlaw": lambda law, X, y, cut, g: law.fit(X, y, cut, g)}
WITHOUT: dict[str, Fit] = {
    INDEPENDENT: lambda law, X, y, cut, g: law.fit(X, y, cut),
    "saturated cells dropped": lambda law, X, y, cut, g: law.fit(X[~cut], y[~cut], None, g[~cut]),
    "saturated cells at face value": lambda law, X, y, cut, g: law.fit(X, y, None, g),
}


def law_coverage(scenario: Scenario, n_grids: int, ways: dict[str, Fit]) -> dict[str, Any]:
    """Coverage and estimates over so many grids, for each way of fitting them."""
    found: dict[str, Any] = {
        "form": scenario.form,
        "truth": scenario.truth,
        "sigma_nats": scenario.sigma,
        "tau_nats": scenario.tau,
        "nested": scenario.nested,
        "n_grids": n_grids,
        "mean_saturated_of_75": float(
            np.mean([synthetic_grid(scenario, seed)[2].sum() for seed in range(n_grids)])
        ),
    }
    for way, fit in ways.items():
        hits, below, open_ends = (dict.fromkeys(scenario.truth, 0) for _ in range(3))
        estimates: dict[str, list[float]] = {name: [] for name in scenario.truth}
        sigmas, r2 = [], []
        for seed in range(n_grids):
            law = fit(MemoryLaw(scenario.form), *synthetic_grid(scenario, seed))
            sigmas.append(law.sigma_)
            r2.append(law.r2_)
            for name, true in scenario.truth.items():
                low, high = law.intervals_[name]
                hits[name] += low <= true <= high
                below[name] += true < low
                open_ends[name] += name in law.identifiability_.unbounded
                estimates[name].append(law.params_[name])
        found[way] = {
            "coverage": {name: n / n_grids for name, n in hits.items()},
            "truth_below_interval": {name: n / n_grids for name, n in below.items()},
            "interval_open": {name: n / n_grids for name, n in open_ends.items()},
            "median_estimate": {name: float(np.median(v)) for name, v in estimates.items()},
            "mean_sigma_nats": float(np.mean(sigmas)),
            "median_r2": float(np.median(r2)),
        }
    return found


# -- recall and plan ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """A true recall law: ln s* = ln size + γ z + κ (z/h)² + ω e, z = ln(ℓ/ℓ0)."""

    size_at_centre: float
    gamma: float
    bend: float
    spread: float

    def draw(self, e: float, n_tokens: float) -> float:
        """The ln s* of a data set, e standard deviations from its length's middle."""
        logs = np.log(LENGTHS)
        z = math.log(n_tokens) - logs.mean()
        middle = math.log(self.size_at_centre) + self.gamma * z
        middle += self.bend * (z / (np.ptp(logs) / 2)) ** 2
        return float(middle + self.spread * e)


def random_thresholds(rng: np.random.Generator) -> Thresholds:
    """As widely as the law's priors allow, with the transition inside the grid at its centre."""
    return Thresholds(
        size_at_centre=float(np.exp(rng.uniform(math.log(1.3), math.log(4.0)))),
        gamma=float(np.clip(rng.normal(1.0, 0.5), 0.2, 2.0)),
        bend=float(rng.normal(0.0, 0.2)),
        spread=float(np.exp(rng.normal(math.log(0.1), 0.8))),
    )


def synthetic_store(
    truth: Thresholds, rng: np.random.Generator, nested: bool = False
) -> list[dict[str, Any]]:
    """Cells of a probe with these thresholds."""
    cells = []
    for n_tokens, drawn in zip(LENGTHS, of_data(rng, nested), strict=True):
        for seed, e in zip(SEEDS, drawn, strict=True):
            threshold = truth.draw(e, n_tokens)
            for rank in RANKS:
                ok = math.log(rank) >= threshold
                cells.append(
                    {
                        "task": "noise:1.0",
                        "rank": rank,
                        "n_parameters": 2112 * rank,
                        "n_tokens": n_tokens,
                        "seed": seed,
                        "base_nll": BASE_NLL,
                        "delta_nll": 5.0,
                        "saturated": False,
                        "certified": ok,
                        "recall": float(ok),
                        "share_under": 0.0 if ok else 0.1,
                        "wall_s": 0.5 * n_tokens**0.5 * rank**0.2,
                    }
                )
    return cells


def plan_coverage(n_stores: int, *, nested: bool = False) -> dict[str, Any]:
    """Random stores; four requests each, of random length, on data not seen."""
    hits = dict.fromkeys(("size_at_centre", "gamma", "bend", "spread"), 0)
    certified, half_fails, in_interval, promised, done = [], [], [], [], 0
    seed = 0
    while done < n_stores:
        rng = np.random.default_rng(seed)
        seed += 1
        truth = random_thresholds(rng)
        cells = synthetic_store(truth, rng, nested)
        if len({cell["certified"] for cell in cells}) < 2:
            continue
        done += 1
        law = RecallLaw().fit_cells(cells)
        for name in hits:
            low, high = law.intervals_[name]
            hits[name] += low <= getattr(truth, name) <= high
        for n_tokens in np.exp(rng.uniform(np.log(32), np.log(256), size=4)).round().astype(int):
            plan = plan_rank(cells, int(n_tokens))
            threshold = truth.draw(rng.normal(), n_tokens)
            certified.append(math.log(plan.rank) >= threshold)
            if plan.rank > 1:
                half_fails.append(math.log(plan.rank // 2) < threshold)
            needed = max(1, math.ceil(math.exp(threshold)))
            in_interval.append(plan.rank_interval[0] <= needed <= plan.rank_interval[1])
            promised.append(plan.probability)
    return {
        "nested": nested,
        "n_stores": n_stores,
        "n_requests": len(certified),
        "confidence_asked": 0.9,
        "recommended_rank_certifies": float(np.mean(certified)),
        "probability_stated": float(np.mean(promised)),
        "half_of_it_fails": float(np.mean(half_fails)),
        "n_requests_with_a_half": len(half_fails),
        "rank_interval_covers": float(np.mean(in_interval)),
        "law_intervals_cover": {name: n / n_stores for name, n in hits.items()},
    }


def share_coverage(n_grids: int) -> dict[str, Any]:
    """Beta-distributed shares, correlated within data sets, of a known mean."""
    from scipy.special import expit
    from scipy.stats import beta, norm

    truth, concentration, correlation = {"a": -6.0, "b": 2.0, "c": 1.5}, 30.0, 0.5
    hits = dict.fromkeys(truth, 0)
    cells = [(r, n, f"{n}|{s}") for n in LENGTHS for s in SEEDS for r in RANKS]
    X, groups = np.array([c[:2] for c in cells], dtype=float), np.array([c[2] for c in cells])
    logs = np.log(X)
    mean = expit(truth["a"] - truth["b"] * logs[:, 0] + truth["c"] * logs[:, 1])
    for seed in range(n_grids):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=len(LENGTHS) * len(SEEDS)).repeat(len(RANKS))
        own = rng.normal(size=len(X))
        at = norm.cdf(math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)
        share = np.clip(beta.ppf(at, mean * concentration, (1 - mean) * concentration), 0, 1)
        law = ShareLaw().fit(X, share, groups)
        for name, true in truth.items():
            low, high = law.intervals_[name]
            hits[name] += low <= true <= high
    return {
        "truth": truth,
        "n_grids": n_grids,
        "coverage": {name: n / n_grids for name, n in hits.items()},
    }


def main() -> int:
    """Run what is named on the command line, all if nothing is."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(law_coverage, scenario, N_GRIDS, AS_IT_IS)
        for name, scenario in SCENARIOS.items()
    }
    for way, fit in WITHOUT.items():
        name = "power-strongly-grouped" if way == INDEPENDENT else "paper-grouped"
        jobs[way] = partial(law_coverage, SCENARIOS[name], N_GRIDS, {way: fit})
    jobs["plan"] = partial(plan_coverage, N_STORES)
    jobs["plan-nested"] = partial(plan_coverage, N_STORES, nested=True)
    jobs["share"] = partial(share_coverage, N_GRIDS)
    names = sys.argv[1:] or list(jobs)
    if unknown := [name for name in names if name not in jobs]:
        print(f"There is no {unknown[0]}; there are {', '.join(jobs)}.", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        started = time.perf_counter()
        found = jobs[name]()
        found["wall_s"] = round(time.perf_counter() - started, 1)
        results[name] = found
        results["versions"] = {package: version(package) for package in ("numpy", "scipy")}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(name, json.dumps(found, ensure_ascii=False), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
