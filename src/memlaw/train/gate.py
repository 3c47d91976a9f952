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
from memlaw.model.forward import logits_of
from memlaw.train.engine import Engine, Job
from memlaw.train.learner import Learner
from memlaw.train.retention import Term

_AT_ONCE = 256
_MOST_SITES = 3  # the highest: what they write changes least of what the others read
_MARGIN = 2.0  # of log-odds, that near misses keep below 0
_SURE = (1.6, 4.0)  # log-odds that records get, at least and at most
_RECORD_WEIGHT = 15.0
_HARM_WEIGHT = 3.0  # of a nat of harm, against a squared log-odd
_ROUNDS = 2  # z is linear but nearly
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What is known of prompts: z [N], what the sites read [N, D_in], and the gradients of z."""

    z: Float32[Tensor, "N"]
    reads: Float32[Tensor, "N D_in"]
    gradients: list[Float32[Tensor, "N _"]]  # of each site
    later: Float32[Tensor, "M D_in"]  # what they read before the later tokens of the answers


def can_gate(adapter: Adapter) -> bool:
    """Whether there are sites enough: one may be folded into what an engine keeps."""
    return len({site.layer for site in adapter.sites}) > 1


def put_gate(engine: Engine, learner: Learner) -> None:
    """Give a learner's adapter one more rank, which parts near misses from records.

    Args:
        engine: its examples are the records, and the near misses that the learner holds.
        learner: with a `holding` that has near misses.
    """
    holding = learner.holding
    assert holding is not None
    lowest = min(site.layer for site in learner.adapter.sites)
    sites = [i for i, s in enumerate(learner.adapter.sites) if s.layer > lowest][-_MOST_SITES:]
    records, near = learner.rows.tolist(), holding.rows[: holding.n_near]
    first = sorted({engine.examples[row].target_ids[0] for row in records})
    base_z = _log_odds(engine, engine.base.at(near), first)
    limits = (base_z + 1).clamp(min=-_MARGIN)
    learner.grow(learner.adapter.rank + 1)
    adapter = learner.adapter
    a: Tensor | None = None
    for _ in range(_ROUNDS):
        at_records, at_near = (
            _look(engine, adapter, sites, rows, first) for rows in (records, near)
        )
        if a is None:
            b = _outputs([at_records, at_near])
            factor = _harm_factor(learner.retention.terms, sites, b, at_records.later)
            want = at_records.z.clamp(*_SURE)
            a = torch.zeros(at_near.reads.shape[1], device=adapter.a[0].device)
        a = _solve(at_records, at_near, a, b, factor, want=want, limits=limits)
        _install(adapter, sites, a, b)
    holding.gated = True
    holding.begin_mean(adapter)


@torch.no_grad()
def _log_odds(engine: Engine, hidden: Tensor, first: list[int]) -> Float32[Tensor, "N"]:
    """z from final hidden states [N, D]."""
    parts = [_odds_of(logits_of(engine.model, h), first) for h in hidden.split(_AT_ONCE)]
    return torch.cat(parts)


def _odds_of(logits: Tensor, first: list[int]) -> Float32[Tensor, "N"]:
    logits = logits.float()
    rest = logits.clone()
    rest[:, first] = -torch.inf
    return logits[:, first].logsumexp(dim=1) - rest.logsumexp(dim=1)


def _look(
    engine: Engine, adapter: Adapter, sites: Sequence[int], rows: Sequence[int], first: list[int]
) -> _Look:
    plain = adapter.folded().requires_grad_(False)
    modules = [adapter.sites[i].module for i in sites]
    z, reads, later = [], [], []
    gradients: list[list[Tensor]] = [[] for _ in sites]
    for start in range(0, len(rows), _AT_ONCE):
        part = list(rows[start : start + _AT_ONCE])
        lengths = torch.tensor([len(engine.examples[row].target_ids) for row in part])
        starts = (lengths.cumsum(0) - lengths).to(adapter.a[0].device)
        hidden, seen, probes = engine.probed(Job(plain, part), modules)
        odds = _odds_of(logits_of(engine.model, hidden[starts]), first)
        odds.sum().backward()
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
        found.append(mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny))
    return found


def _harm_factor(
    terms: Sequence[Term], sites: Sequence[int], b: Sequence[Tensor], later: Tensor
) -> Float32[Tensor, "D_in D_in"]:
    """L, lower triangular, with `aᵀ L Lᵀ a` twice the nats that the gate costs.

    On what retention looks at, and at the later tokens of the records' answers.
    """
    widths: list[int] = []
    harm: Tensor | None = None
    for term in terms:
        of_site = {site: n for n, site in enumerate(term.sites)}
        if not all(site in of_site for site in sites):
            continue
        x = torch.cat([term.reads[of_site[site]] for site in sites], dim=1)
        g = torch.stack([term.writes[of_site[s]] @ v for s, v in zip(sites, b, strict=True)], dim=1)
        widths = [term.reads[of_site[site]].shape[1] for site in sites]
        cross = _spread(g.T @ g, widths)
        part = term.weight * (x.T @ x) * cross
        harm = part if harm is None else harm + part
        last = cross
    if harm is None:  # no retention: all directions cost the same
        return torch.eye(later.shape[1], device=later.device)
    if len(later):
        harm = harm + later.T @ later / len(later) * last
    floor = 1e-3 * harm.diagonal().mean()
    harm.diagonal().add_(floor)
    factor: Tensor = torch.linalg.cholesky(harm.cpu()).to(harm.device)
    return factor


def _spread(small: Tensor, widths: Sequence[int]) -> Tensor:
    """A matrix over sites [L, L], each entry repeated over the sites' widths."""
    counts = torch.tensor(widths, device=small.device)
    return small.repeat_interleave(counts, dim=0).repeat_interleave(counts, dim=1)


def _solve(
    records: _Look,
    near: _Look,
    a: Tensor,
    b: Sequence[Tensor],
    factor: Tensor,
    *,
    want: Tensor,
    limits: Tensor,
) -> Float32[Tensor, "D_in"]:
    """The input directions, one after the other, by L-BFGS in coordinates in which harm is round.

    Args:
        records, near: as the model is with the gate `a`.
        a: the gate that is there.
        b: its output directions.
        factor: of the harm.
        want: log-odds that each record must have.
        limits: log-odds that each near miss may have.
    """

    def effects(look: _Look) -> Tensor:  # of a on z: [N, D_in]
        slopes = torch.stack([g @ v for g, v in zip(look.gradients, b, strict=True)], dim=1)
        widths = [look.reads.shape[1] // len(b)] * len(b)
        return look.reads * slopes.repeat_interleave(
            torch.tensor(widths, device=slopes.device), dim=1
        )

    known, others = effects(records), effects(near)
    z_known, z_others = records.z - known @ a, near.z - others @ a
    both = torch.linalg.solve_triangular(factor, torch.cat([known, others]).T, upper=False).T
    known, others = both.split([len(known), len(others)])
    c = (factor.T @ a).detach().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [c], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        missing = (want - z_known - known @ c).relu()
        over = (z_others + others @ c - limits).relu()
        total: Tensor = (
            _RECORD_WEIGHT * missing.square().mean()
            + over.square().mean()
            + 0.5 * _HARM_WEIGHT * c.square().sum()
        )
        total.backward()
        return total

    optimizer.step(loss)
    found: Tensor = torch.linalg.solve_triangular(factor.T, c.detach()[:, None], upper=True)[:, 0]
    return found


@torch.no_grad()
def _install(adapter: Adapter, sites: Sequence[int], a: Tensor, b: Sequence[Tensor]) -> None:
    """Put the gate into the last rank, its two sides of equal length."""
    parts = a.split([adapter.a[site].shape[0] for site in sites])
    for site, read, write in zip(sites, parts, b, strict=True):
        scale = read.norm().clamp(min=1e-12).sqrt()
        adapter.a[site][:, -1] = read / scale
        adapter.b[site][-1] = write * scale
