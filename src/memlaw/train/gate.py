"""The gate: the least change under which near misses no longer begin to be answered as records.

Whether a prompt is a record's shows in one number z, the log-odds that its answer begins as some
record's does. A change of rank one at each of a few sites moves it nearly linearly: with the
output directions b fixed, `z + Σ_sites (x · a)(g · b)`, x what the site reads at the last position
of the prompt and g the gradient of z at its output. So the input directions a that part near
misses from records with the least harm are the solution of a convex problem, in which thousands of
near misses cost no more than dozens. Steps of training, which see a few of them at a time, come
there slowly (source: ours).

Shapes: N prompts, D_in widths of the gate's sites together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.model.adapter import Adapter
from memlaw.train.engine import Engine, Job
from memlaw.train.learner import Learner
from memlaw.train.retention import quadratic_penalty

_AT_ONCE = 256
_MOST_SITES = 3  # the highest: what they write changes least of what the others read
_MARGIN = 3.0  # of log-odds, that near misses keep below 0
_SURE = (1.6, 4.0)  # log-odds that records get, at least and at most
_RECORD_WEIGHT = 15.0
_FAILED_WEIGHT = 16.0  # times that, each time that a record failed an audit which the rest passed
_HARM_WEIGHT = 30.0  # of a nat of harm, against a squared log-odd
_ROUNDS = 3  # z is linear but nearly; and of a gate that was there, which moves little, 1
_ITERATIONS = 200
_REACH = 3.0  # of log-odds: a near miss that is further below its limit isn't looked at again
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What is known of prompts: z [N], what the sites read [N, D_in], and the gradients of z."""

    z: Float32[Tensor, "N"]
    reads: Float32[Tensor, "N D_in"]
    gradients: list[Float32[Tensor, "N _"]]  # of each site
    later: Float32[Tensor, "M D_in"]  # what they read before the later tokens of the answers


@dataclass(frozen=True, kw_only=True)
class _Line:
    """z of prompts as a function of the gate's input directions: rest [N] + slopes [N, D_in] a."""

    rest: Float32[Tensor, "N"]
    slopes: Float32[Tensor, "N D_in"]

    def at(self, a: Float32[Tensor, "D_in"]) -> Float32[Tensor, "N"]:
        return self.rest + self.slopes @ a


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What is asked of a gate.

    Attributes:
        b: its output directions, of length 1.
        want: log-odds that each record must have.
        weights: what each record's missing them counts, beside another's.
        limits: log-odds that each near miss may have.
        factor, pull: what it costs; see `_harm`.
    """

    b: Sequence[Float32[Tensor, "_"]]
    want: Float32[Tensor, "N"]
    weights: Float32[Tensor, "N"]
    limits: Float32[Tensor, "M"]
    factor: Float32[Tensor, "D_in D_in"]
    pull: Float32[Tensor, "D_in"]


def can_gate(adapter: Adapter) -> bool:
    """Whether there are sites enough: one may be folded into what an engine keeps."""
    return len({site.layer for site in adapter.sites}) > 1


def add_gate(learner: Learner) -> None:
    """Give a learner's adapter one more rank, for a gate; it computes the same function still.

    Args:
        learner: with a `holding`, whose mean begins anew.
    """
    holding = learner.holding
    assert holding is not None
    learner.grow(learner.adapter.rank + 1)
    holding.gate = learner.adapter.rank - 1
    holding.begin_mean(learner.adapter)


def _gate_sites(adapter: Adapter) -> list[int]:
    lowest = min(site.layer for site in adapter.sites)
    return [i for i, s in enumerate(adapter.sites) if s.layer > lowest][-_MOST_SITES:]


def solve_gate(engine: Engine, learner: Learner) -> None:
    """Solve the gate for the weights as they are, and put it into the rank that is there for it.

    A gate that is there already is solved anew: what it writes stays, what it reads is solved for.

    Args:
        engine: its examples are the records, and the near misses that the learner holds.
        learner: with a `holding` that has near misses, and a rank for the gate.
    """
    holding, adapter = learner.holding, learner.adapter
    assert holding is not None
    assert holding.gate is not None
    sites = _gate_sites(adapter)
    columns = [adapter.b[i][holding.gate].detach() for i in sites]
    b = [column / column.norm() for column in columns] if all(map(torch.any, columns)) else None
    records, near = list(range(len(learner.examples))), holding.rows[: holding.n_near]
    first = sorted({engine.examples[row].target_ids[0] for row in records})
    limits = (_log_odds(engine, engine.base.at(near), first) + 1).clamp(min=-_MARGIN)
    problem: _Problem | None = None
    width = len(_column(adapter, sites, holding.gate))
    others = _Line(rest=limits.clone(), slopes=limits.new_zeros(len(near), width))
    close = torch.arange(len(near), device=limits.device)
    for _ in range(_ROUNDS if b is None else 1):
        now = _column(adapter, sites, holding.gate)
        at_records = _look(engine, adapter, sites, records, first)
        at_near = _look(engine, adapter, sites, [near[i] for i in close.tolist()], first)
        if problem is None:
            b = b or _outputs([at_records, at_near])
            problem = _Problem(
                b=b,
                want=at_records.z.clamp(*_SURE),
                weights=(_FAILED_WEIGHT**holding.failed).to(limits.device),
                limits=limits,
                **_harm(learner, sites, holding.gate, b, at_records.later),
            )
        # Those that aren't looked at again are where their lines say, as far as anybody knows.
        seen = _line(at_near, problem.b, now)
        others.rest[close], others.slopes[close] = seen.rest, seen.slopes
        a = _solve(_line(at_records, problem.b, now), others, now, problem)
        _install(adapter, sites, holding.gate, a, problem.b)
        close = (others.at(a) > limits - _REACH).nonzero()[:, 0]
        if not len(close):
            break


@torch.no_grad()
def _log_odds(engine: Engine, hidden: Tensor, first: list[int]) -> Float32[Tensor, "N"]:
    """z from final hidden states [N, D]."""
    parts = [_odds_of(engine.head(h), first) for h in hidden.split(_AT_ONCE)]
    return torch.cat(parts)


def _odds_of(logits: Tensor, first: list[int]) -> Float32[Tensor, "N"]:
    logits = logits.float()
    rest = logits.clone()
    rest[:, first] = -torch.inf
    return logits[:, first].logsumexp(dim=1) - rest.logsumexp(dim=1)


def _look(
    engine: Engine, adapter: Adapter, sites: Sequence[int], rows: Sequence[int], first: list[int]
) -> _Look:
    """Look at prompts."""
    plain = adapter.folded().requires_grad_(False)
    modules = [adapter.sites[i].module for i in sites]
    z, reads, later = [], [], []
    gradients: list[list[Tensor]] = [[] for _ in sites]
    for start in range(0, len(rows), _AT_ONCE):
        part = list(rows[start : start + _AT_ONCE])
        lengths = torch.tensor([len(engine.examples[row].target_ids) for row in part])
        starts = (lengths.cumsum(0) - lengths).to(adapter.a[0].device)
        hidden, seen, probes = engine.probed(Job(plain, part), modules)
        odds = _odds_of(engine.head(hidden[starts]), first)
        is_first = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        is_first[starts] = True
        x = torch.cat(
            [
                adapter.whiteners[i].apply(read.float().T).T if adapter.whiteners else read.float()
                for i, read in zip(sites, seen, strict=True)
            ],
            dim=1,
        )
        z.append(odds.detach())
        reads.append(x[starts])
        later.append(x[~is_first])
        odds.sum().backward()
        for found, probe in zip(gradients, probes, strict=True):
            found.append(torch.cat([p.grad for p in probe])[starts])  # type: ignore[misc]
    return _Look(
        z=torch.cat(z),
        reads=torch.cat(reads),
        gradients=[torch.cat(parts) for parts in gradients],
        later=torch.cat(later),
    )


def _outputs(looks: Sequence[_Look]) -> list[Float32[Tensor, "_"]]:
    """At each site the direction [D_out], of length 1, that moves z most on the whole."""
    found = []
    for parts in zip(*(look.gradients for look in looks), strict=True):
        mean = torch.cat(parts).mean(dim=0)
        found.append(mean / mean.norm().clamp(min=_TINY))
    return found


def _harm(
    learner: Learner, sites: Sequence[int], column: int, b: Sequence[Tensor], later: Tensor
) -> dict[str, Tensor]:
    """What a gate costs, in nats: `½ aᵀ L Lᵀ a + p · a`, beside what doesn't depend on it.

    Retention's form on the whole adapter; and on the later tokens of the records' answers, on what
    the gate does there that the one which stands there doesn't.

    Returns:
        `factor`: L, lower triangular, [D_in, D_in]; `pull`: p [D_in].
    """
    adapter = learner.adapter
    harm = torch.zeros(later.shape[1], later.shape[1], device=later.device)
    cross: Tensor | None = None  # of the last term
    for term in learner.retention.terms:
        of_site = {site: n for n, site in enumerate(term.sites)}
        if not all(site in of_site for site in sites):
            continue
        x = torch.cat([term.reads[of_site[site]] for site in sites], dim=1)
        g = torch.stack([term.writes[of_site[s]] @ v for s, v in zip(sites, b, strict=True)], dim=1)
        widths = [term.reads[of_site[site]].shape[1] for site in sites]
        cross = _spread(g.T @ g, widths)
        harm += term.weight * (x.T @ x) * cross
    pull = _pull(learner, sites, column, b)
    if cross is None:  # no retention: all directions cost the same
        harm = torch.eye(len(harm), device=later.device)
    elif len(later):
        at_later = later.T @ later / len(later) * cross
        harm += at_later
        pull = pull - at_later @ _column(adapter, sites, column)
    harm.diagonal().add_(1e-3 * harm.diagonal().mean())
    return {"factor": torch.linalg.cholesky(harm.cpu()).to(harm.device), "pull": pull}


def _pull(
    learner: Learner, sites: Sequence[int], column: int, b: Sequence[Tensor]
) -> Float32[Tensor, "D_in"]:
    """How retention's form on the rest of the adapter changes with a gate's input directions."""
    adapter = learner.adapter
    factors = [
        (a.detach().clone(), out.detach().clone())
        for a, out in zip(adapter.a, adapter.b, strict=True)
    ]
    for site, direction in zip(sites, b, strict=True):
        factors[site][0][:, column] = 0
        factors[site][1][column] = direction
    reads = [factors[site][0].requires_grad_() for site in sites]
    penalty = quadratic_penalty(learner.retention.terms, factors)
    if not penalty.requires_grad:
        return torch.zeros(sum(len(a) for a in reads), device=reads[0].device)
    return torch.cat([grad[:, column] for grad in torch.autograd.grad(penalty, reads)])


def _spread(small: Tensor, widths: Sequence[int]) -> Tensor:
    """A matrix over sites [L, L], each entry repeated over the sites' widths."""
    counts = torch.tensor(widths, device=small.device)
    return small.repeat_interleave(counts, dim=0).repeat_interleave(counts, dim=1)


def _line(look: _Look, b: Sequence[Tensor], a: Float32[Tensor, "D_in"]) -> _Line:
    """What a look, taken with the gate `a` in place, says of other gates with outputs `b`."""
    at_sites = torch.stack([g @ v for g, v in zip(look.gradients, b, strict=True)], dim=1)
    width = look.reads.shape[1] // len(b)
    slopes = look.reads * at_sites.repeat_interleave(width, dim=1)
    return _Line(rest=look.z - slopes @ a, slopes=slopes)


def _solve(
    records: _Line, near: _Line, a: Float32[Tensor, "D_in"], problem: _Problem
) -> Float32[Tensor, "D_in"]:
    """The input directions, one after the other, by L-BFGS in coordinates in which harm is round.

    Args:
        records, near: how a gate moves them.
        a: the gate that is there, to begin with.
        problem: what is asked of it.
    """
    factor = problem.factor
    columns = torch.cat([records.slopes, near.slopes, problem.pull[None]]).T
    rounded = torch.linalg.solve_triangular(factor, columns, upper=False).T
    known, others, (pull,) = rounded.split([len(records.rest), len(near.rest), 1])
    c = (factor.T @ a).detach().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [c], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        missing = (problem.want - records.rest - known @ c).relu()
        over = (near.rest + others @ c - problem.limits).relu()
        total: Tensor = (
            _RECORD_WEIGHT * (problem.weights * missing.square()).mean()
            + over.square().mean()
            + _HARM_WEIGHT * (0.5 * c.square().sum() + pull @ c)
        )
        total.backward()
        return total

    optimizer.step(loss)
    found: Tensor = torch.linalg.solve_triangular(factor.T, c.detach()[:, None], upper=True)[:, 0]
    return found


def _column(adapter: Adapter, sites: Sequence[int], column: int) -> Float32[Tensor, "D_in"]:
    """A rank's input directions, scaled so that its output directions have length 1."""
    return torch.cat(
        [adapter.a[i][:, column].detach() * adapter.b[i][column].detach().norm() for i in sites]
    )


@torch.no_grad()
def _install(
    adapter: Adapter,
    sites: Sequence[int],
    column: int,
    a: Float32[Tensor, "D_in"],
    b: Sequence[Tensor],
) -> None:
    """Put a gate into its rank, its two sides of equal length."""
    parts = a.split([adapter.a[site].shape[0] for site in sites])
    for site, read, write in zip(sites, parts, b, strict=True):
        scale = read.norm().clamp(min=_TINY).sqrt()
        adapter.a[site][:, column] = read / scale
        adapter.b[site][column] = write * scale
