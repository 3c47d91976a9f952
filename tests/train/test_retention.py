"""The quadratic penalty: what it stands for, over one site and over several together."""

import pytest
import torch

from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site
from memlaw.train.precondition import Whitener
from memlaw.train.retention import Retention, Term, quadratic_penalty, separate_terms

WIDTHS = [(5, 3), (4, 6), (7, 2)]
N, M = 9, 11


def _site(d_in, d_out):
    return Site(
        module=f"{d_in}", d_in=d_in, d_out=d_out, layer=0, is_linear=True, is_transposed=False
    )


@pytest.fixture
def drawn():
    """Samples, and factors of an adapter: x, g, a, b for each site."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        (draw(N, d_in), draw(M, d_out), draw(d_in, 2), draw(2, d_out)) for d_in, d_out in WIDTHS
    ]


def _joint(drawn, weight=1.0):
    return Term(
        sites=range(len(drawn)),
        reads=[x / N**0.5 for x, *_ in drawn],
        writes=[g / M**0.5 for _, g, *_ in drawn],
        weight=weight,
    )


def test_several_sites_together_count_what_they_change_together(drawn):
    # What the adapter adds at each position, along each gradient, summed over the sites.
    moved = sum(x @ a @ b @ g.T for x, g, a, b in drawn)  # [N, M]
    expected = 0.5 * float(moved.square().mean())
    found = quadratic_penalty([_joint(drawn)], [(a, b) for *_, a, b in drawn])
    assert float(found) == pytest.approx(expected, rel=1e-5)
    apart = sum(0.5 * float((x @ a @ b @ g.T).square().mean()) for x, g, a, b in drawn)
    assert abs(apart - expected) > 0.05 * expected  # cross terms are not small


def test_its_gradient_is_that_of_the_written_out_form(drawn):
    """⟨Aᵀ S A, B G Bᵀ⟩ of block-diagonal A and B."""
    factors = [(a.requires_grad_(), b.requires_grad_()) for *_, a, b in drawn]
    quadratic_penalty([_joint(drawn, weight=3.0)], factors).backward()
    found = [p.grad.clone() for pair in factors for p in pair]
    for pair in factors:
        for p in pair:
            p.grad = None
    x, g = (torch.cat(parts, dim=1) for parts in list(zip(*drawn, strict=True))[:2])
    s, g = x.T @ x / N, g.T @ g / M
    a, b = (torch.block_diag(*parts) for parts in zip(*factors, strict=True))
    (1.5 * ((a.T @ s @ a) * (b @ g @ b.T)).sum()).backward()
    for mine, (_, p) in zip(found, ((pair, p) for pair in factors for p in pair), strict=True):
        assert p.grad.norm() > 0
        assert torch.allclose(mine, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


def test_one_site_of_one_text_is_the_same_either_way(drawn):
    x, g, a, b = drawn[0]
    at_site = x / N**0.5, g / M**0.5
    joint, apart = (
        float(quadratic_penalty(terms, [(a, b)]))
        for terms in ([_joint(drawn[:1])], separate_terms([at_site]))
    )
    assert joint == apart > 0


def test_whitening_changes_the_coordinates_and_not_the_penalty(drawn):
    sites = [_site(d_in, d_out) for d_in, d_out in WIDTHS]
    whiteners = [Whitener(x, x, mixture=0.5, damping=0.01) for x, *_ in drawn]
    adapter = Adapter(sites, rank=2, seed=0, whiteners=whiteners)
    with torch.no_grad():
        for p, (*_, b) in zip(adapter.b, drawn, strict=True):
            p.copy_(b)
    within = Retention(1000.0, [_joint(drawn)], adapter, n_tokens=10)
    plain = adapter.folded()
    outside = Retention(1000.0, [_joint(drawn)], plain, n_tokens=10)
    assert float(within.loss(adapter, 0)) == pytest.approx(float(outside.loss(plain, 0)), rel=1e-4)
    assert float(within.loss(adapter, 0)) == pytest.approx(float(within.penalty(adapter)), rel=1e-6)


def test_dropping_out_what_is_read_adds_a_share_of_its_diagonal():
    generator = torch.Generator().manual_seed(1)
    n, mixed = 40_000, torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 0.5]])
    x = torch.randn(n, 2, generator=generator) @ mixed / n**0.5  # entries that go together
    term = Term(sites=[0, 1], reads=[x, 2 * x], writes=[torch.eye(2), torch.eye(2)])
    assert term.dropped_out(0.0, seed=5) is term
    both = torch.cat([x, 2 * x], dim=1)
    wanted = both.T @ both
    wanted += 0.5 * torch.diag(wanted.diagonal())
    kept = 1 / 1.5
    reads = term.dropped_out(0.5, seed=5).reads
    found = torch.cat(reads, dim=1)
    # Five standard errors of the largest entry, a mean of n values (x m)² with E x² = 3.6.
    atol = 5 * 3.6 * (3 / kept**3 - 1 / kept**2) ** 0.5 / n**0.5
    assert torch.allclose(found.T @ found, wanted, atol=atol)
    assert not torch.allclose(both.T @ both, wanted, atol=atol)
    again = term.dropped_out(0.5, seed=5).reads
    assert all(torch.equal(one, two) for one, two in zip(reads, again, strict=True))
    assert not torch.equal(reads[0], term.dropped_out(0.5, seed=6).reads[0])
