"""Writing as the change of least harm: Gauss-Newton over all tokens at once, instead of AdamW.

    python benchmarks/least_harm.py --records 100 --seed 0
    python benchmarks/least_harm.py --records 100 --seed 0 --retention 10000 --damping 0.01

A sketch, not a solver of `write`; what it found stands in docs/speed.md. Each pass runs all records
once, forwards and backwards. Below the adapted module everything is frozen, so what it reads is
known; what a change of its weight does to a token's log-odds is linear but nearly, and told by one
gradient: that at the token's own position, with the attention to others cut. So the change that
brings all tokens over the line with the least harm (retention's quadratic form, damped) is a system
as large as there are tokens. How far a pass goes is told by how well the last one was foretold. The
weight is cut down to the rank in the metric of the pass. Of records with tokens under the line at
the end, the gradients of each token at all positions are taken.

Without specificity, one site, on a CPU. Records are made-up phone numbers. A line a pass, and one
of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from update import People

from memlaw.data.encoding import encode
from memlaw.data.record import Record
from memlaw.data.texts import general_texts
from memlaw.measure.damage import WINDOW_TOKENS
from memlaw.measure.examine import audit_examples
from memlaw.measure.unseen_text import UnseenText
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.forward import logits_of
from memlaw.model.sites import resolve_sites
from memlaw.settings.write import WriteConfig
from memlaw.train import attention, cached
from memlaw.writer.setup import general_moments

Tensor = torch.Tensor
_GOAL, _DONE = 2.0, 0.85  # log-odds: aimed at; p .70
_STEP = 4.0  # of log-odds, that a pass asks of a token at most
_STUBBORN, _MOST = 1.7, 50.0  # what a token under _DONE weighs more from pass to pass, and at most


def cut_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention whose gradient goes to a position's own states only."""
    b, h, n, width = query.shape
    m = key.shape[2]
    if mask is None:
        mask = torch.ones(n, m, dtype=torch.bool).tril()
    scale = width**-0.5 if scaling is None else scaling
    rows = (query * scale).reshape(b, key.shape[1], -1, width)
    scores = (rows @ key.detach().mT).unflatten(2, (-1, n)).float()
    weights = scores.masked_fill(~mask.view(n, m), -torch.inf).softmax(-1).to(query.dtype)
    out = (weights.flatten(2, 3) @ value.detach()).view(b, key.shape[1], -1, n, width)
    own = torch.diagonal(weights[..., m - n :], dim1=-2, dim2=-1).detach()
    here = value[:, :, m - n :]
    out = out + own[..., None] * (here - here.detach())[:, :, None]
    return out.reshape(b, h, n, width).transpose(1, 2).flatten(0, 1)


@contextmanager
def attending(function: Any) -> Iterator[None]:
    """Within the block short records attend so."""
    usual = attention._short_attention
    attention._short_attention = function
    try:
        yield
    finally:
        attention._short_attention = usual


class Seen(NamedTuple):
    """What a pass saw: nll and log-odds [N], and gradients of the latter, as (token, read, at)."""

    nll: Tensor
    z: Tensor
    token: Tensor
    reads: Tensor
    gradients: Tensor


class Book:
    """Records, and what runs them from the adapted layer on."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = WriteConfig(specificity=False).resolved()
        self.base = load_model()
        model, tokenizer = self.base.model, self.base.tokenizer
        book = People(args.seed).more(args.records)
        records = [Record(prompt=p, completion=c, id=p) for p, c in book.items()]
        self.examples = encode(records, tokenizer, format="chat", max_tokens=None)
        self.sites = resolve_sites(model, config.placement, config.layers)
        self.engine = cached.CachedEngine(model, self.sites, self.examples)
        assert all(self.engine.packed.packer.shares), "records don't begin alike"
        texts = general_texts()
        ids = torch.tensor(tokenizer(texts.retained)["input_ids"])
        retained = ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
        spread = torch.linspace(0, len(retained) - 1, min(args.windows, len(retained)))
        retained = retained[spread.long()]
        ((self.reads, self.writes),) = general_moments(self.base, self.sites, retained, seed=0)
        self.unseen = UnseenText(
            self.base, texts.unseen, texts.unseen_name, min(s.layer for s in self.sites)
        )
        lengths = torch.tensor([len(e.target_ids) for e in self.examples])
        self.owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # of each token
        self.first = (lengths.cumsum(0) - lengths).tolist()

    def run(self, weight: Tensor, rows: list[int], *, everywhere: bool = False) -> Seen:
        """Records with a weight beside the adapted one, [D_in, D_out], and what moves their tokens.

        Args:
            weight: what is added.
            rows: of the records.
            everywhere: the gradients of each token at all positions; else at its own.
        """
        engine, model = self.engine, self.base.model
        assert engine.site_input is not None
        found = []
        usual = attention._short_attention
        with attending(usual if everywhere else cut_attention):
            for pack, _ in engine.packed.packs([rows]):
                here = engine.site_input.read(pack.places).float()
                added = (here @ weight).requires_grad_()
                states = engine.hidden_in.read(pack.places)[None]
                states = (states.float() + added[None]).to(states.dtype)
                layers = list(engine.layers)
                for i in range(engine.lowest + 1):
                    engine.layers[i] = cached._Constant(states, engine.returns_tuple)
                try:
                    hidden = engine.packed.run(pack)[pack.keep]
                finally:
                    for i in range(engine.lowest + 1):
                        engine.layers[i] = layers[i]
                nll, by_hidden = [], []
                for part, targets in zip(
                    hidden.split(256), pack.target_ids.split(256), strict=True
                ):
                    leaf = part.detach().requires_grad_()
                    logits = logits_of(model, leaf).float()
                    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                    by_hidden.append(torch.autograd.grad(losses.sum(), leaf)[0])
                    nll.append(losses.detach())
                found.append((pack, here, added, hidden, torch.cat(nll), torch.cat(by_hidden)))
        parts = []
        at = 0
        for pack, here, added, hidden, nll, by_hidden in found:
            z = -nll - torch.log(-torch.expm1(-nll.clamp(min=1e-6)))
            by_hidden = -by_hidden / (1 - torch.exp(-nll)).clamp(min=1e-4)[:, None]  # of z
            n = 0
            mine: list[int] = []
            while n < len(nll):  # whole records, in their order
                mine.append(rows[at])
                n += len(self.examples[rows[at]].target_ids)
                at += 1
            tokens = torch.cat(
                [self.first[r] + torch.arange(len(self.examples[r].target_ids)) for r in mine]
            )
            place = torch.cat([torch.arange(len(self.examples[r].target_ids)) for r in mine])
            if not everywhere:
                (g,) = torch.autograd.grad(hidden, added, by_hidden.to(hidden.dtype))
                parts.append(Seen(nll, z, tokens, here[pack.keep], g.float()[pack.keep]))
                continue
            positions = torch.full((len(here),), -1)  # the record of each, in `mine`
            starts = engine.packed.packer.starts.tolist()
            end = len(here)
            for i in reversed(range(len(mine))):
                length = starts[mine[i] + 1] - starts[mine[i]]
                positions[end - length : end] = i
                end -= length
            for j in range(int(place.max()) + 1):
                chosen = by_hidden * (place == j)[:, None]
                (g,) = torch.autograd.grad(
                    hidden, added, chosen.to(hidden.dtype), retain_graph=True
                )
                live = ((g.abs().sum(1) > 0) & (positions >= 0)).nonzero()[:, 0]
                of = [self.first[mine[i]] + j for i in positions[live].tolist()]
                parts.append(Seen(nll[:0], z[:0], torch.tensor(of), here[live], g.float()[live]))
            parts.append(Seen(nll, z, tokens[:0], here[:0], by_hidden.float()[:0]))
        return Seen(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def duals(goal: Tensor, start: Tensor, gram: Tensor, weights: Tensor) -> Tensor:
    """What each token pulls with, [N]: by Newton, least of ½ aᵀQa + Σ w softplus(goal − z − Qa)."""
    softplus = torch.nn.functional.softplus

    def value(a: Tensor, moved: Tensor) -> float:
        return float(0.5 * a @ moved + (weights * softplus(goal - start - moved)).sum())

    a = weights * torch.sigmoid(goal - start)
    moved = gram @ a
    now = value(a, moved)
    for _ in range(30):
        p = torch.sigmoid(goal - start - moved)
        curve = weights * p * (1 - p)
        step = torch.linalg.solve(torch.eye(len(a)) + curve[:, None] * gram, a - weights * p)
        by, share = gram @ step, 1.0
        while share > 0.01:
            after = value(a - share * step, moved - share * by)
            if after < now:
                break
            share /= 2
        a, moved = a - share * step, moved - share * by
        if now - after < 1e-3 * max(1.0, abs(now)):
            break
        now = after
    return a


def write(book: Book, args: argparse.Namespace) -> dict[str, Any]:
    """Passes until every token has p .70, or there were enough."""
    started = time.perf_counter()
    n_tokens, rows = len(book.owner), list(range(len(book.examples)))
    reads, writes = book.reads.T @ book.reads, book.writes.T @ book.writes
    d_in, d_out = len(reads), len(writes)
    harm_in = reads + args.damping * reads.diagonal().mean() * torch.eye(d_in)
    harm_out = writes + args.damping * writes.diagonal().mean() * torch.eye(d_out)
    root = torch.linalg.cholesky(harm_out)
    back = torch.linalg.inv(root)
    assert book.engine.site_input is not None
    all_reads = book.engine.site_input.read(
        torch.arange(int(book.engine.packed.packer.starts[-1]))
    ).float()
    on_records = all_reads.T @ all_reads / len(all_reads)
    share = min(1.0, n_tokens / 1000)
    held, most_held = min(args.begin, args.retention) * share, args.retention * share
    near = 4.0 * held  # how much the records' own outputs hold back a pass
    weights = torch.ones(n_tokens)
    change = torch.zeros(d_in, d_out)  # of the weight, times the root of the output's metric

    def loss(z: Tensor, change: Tensor) -> float:
        harm = 0.5 * held * float((change * (harm_in @ change)).sum())
        return float((weights * torch.nn.functional.softplus(_GOAL - z)).sum()) + harm

    seen = book.run(change @ back, rows)
    now, polished = loss(seen.z, change), 0
    for number in range(1, args.passes + 1):
        token, read, gradient = seen.token, seen.reads, seen.gradients
        unsafe = sorted(set(book.owner[seen.z < 0.5].tolist()))
        if 0 < len(unsafe) <= 0.3 * len(rows):
            more = book.run(change @ back, unsafe, everywhere=True)
            size = more.gradients.square().sum(1) * more.reads.square().sum(1)
            total = torch.zeros(n_tokens).index_add_(0, more.token, size)
            large = size > 0.02 * total[more.token]
            safe = ~torch.isin(book.owner[token], torch.tensor(unsafe))
            token = torch.cat([token[safe], more.token[large]])
            read = torch.cat([read[safe], more.reads[large]])
            gradient = torch.cat([gradient[safe], more.gradients[large]])
        g = torch.linalg.solve_triangular(root, gradient.T, upper=False).T
        by_g = g @ g.T

        def by_token(x: Tensor, token: Tensor = token) -> Tensor:
            return torch.zeros(n_tokens, *x.shape[1:]).index_add_(0, token, x)

        for _ in range(6):
            factor = torch.linalg.cholesky(held * harm_in + near * on_records)
            keys = torch.linalg.solve_triangular(factor, read.T, upper=False).T
            gram = by_token(by_token((keys @ keys.T) * by_g).T.contiguous())
            rest = torch.cholesky_solve(near * (on_records @ change), factor)
            start = seen.z + by_token((g * (read @ (rest - change))).sum(1))
            goal = torch.minimum(torch.full_like(start, _GOAL), seen.z + _STEP)
            pulls = duals(goal, start, gram, weights)[token]
            new = rest + torch.linalg.solve_triangular(
                factor.T, keys.T @ (pulls[:, None] * g), upper=True
            )
            _, vectors = torch.linalg.eigh(new.T @ (factor @ (factor.T @ new)))
            new = new @ vectors[:, -args.rank :] @ vectors[:, -args.rank :].T
            foretold = loss(seen.z + by_token((g * (read @ (new - change))).sum(1)), new)
            after = book.run(new @ back, rows)
            got = loss(after.z, new) - now
            kept_word = got / min(foretold - now, -1e-9)
            if got < 0:
                break
            near *= 4
        else:
            print("no pass is an improvement any more", flush=True)
            break
        change, seen, now = new, after, now + got
        near *= next(f for q, f in _FACTORS if kept_word > q)
        p = torch.exp(-seen.nll)
        n_under = int((p < 0.55).sum())
        print(
            f"pass {number}: {time.perf_counter() - started:.0f} s, {float(seen.nll.mean()):.3f} "
            f"nats, {n_under} under, lowest p {float(p.min()):.2f}; of what was foretold "
            f"{kept_word:.2f}",
            flush=True,
        )
        if held >= most_held and bool((seen.z > _DONE).all()):
            polished += 1
            if polished > args.polish:
                break
        if n_under < 0.3 * n_tokens:
            grown = torch.where(seen.z < _DONE, weights * _STUBBORN, weights)
            weights = torch.where(seen.z > 2.5, weights / 1.2, grown).clamp(1.0, _MOST)
            held, near = min(most_held, held * args.grow), near * min(most_held / held, args.grow)
            now = loss(seen.z, change)
    return finished(book, change @ back, args, number, time.perf_counter() - started)


_FACTORS = ((0.85, 1 / 3), (0.7, 1 / 1.5), (0.55, 1.0), (0.3, 2.0), (-math.inf, 4.0))


def finished(
    book: Book, weight: Tensor, args: argparse.Namespace, passes: int, seconds: float
) -> dict[str, Any]:
    """What the adapter is worth: read by the whole model, and harm to unseen text."""
    model = book.base.model
    adapter = Adapter(book.sites, rank=args.rank, seed=0)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    adapter.put([(left[:, : args.rank] * values[: args.rank], right[: args.rank])])
    with adapter.attached(model):
        audit = audit_examples(model, book.base.tokenizer, book.examples, decode="none")
    harm = book.unseen.measure(model, lambda: adapter.attached(model))
    return vars(args) | {
        "passes": passes,
        "seconds": seconds,
        "passed": sum(record.passed for record in audit.records),
        "damage_nats": harm.delta_nll_nats,
        "damage_ci95": harm.delta_nll_ci95,
        "kl_nats": harm.kl_nats,
    }


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--retention", type=float, default=30_000.0)
    parser.add_argument("--begin", type=float, default=30_000.0, help="retention, at first")
    parser.add_argument("--grow", type=float, default=1.5, help="by this from pass to pass")
    parser.add_argument("--polish", type=int, default=0, help="passes when all is learnt")
    parser.add_argument("--damping", type=float, default=0.3, help="of the metric of harm")
    parser.add_argument("--windows", type=int, default=32, help="of text that harm is read on")
    parser.add_argument("--passes", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(write(Book(args), args)))


if __name__ == "__main__":
    main()
