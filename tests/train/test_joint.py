"""What sites read and write at the same positions: the same whichever way texts are run."""

import pytest
import torch

from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.train import joint
from memlaw.train.joint import joint_samples

BEGINNING = [3, 14, 15, 92, 65]
TEXTS = [
    BEGINNING + [(7 * i + j) % 90 for j in range(n)] for i, n in enumerate((1, 9, 4, 4, 13, 2) * 4)
]


@pytest.fixture(params=["llama", "gpt2", "gemma", "mistral"])
def sampled(request, make_model):
    """`sampled(most)`: of one model the inputs and gradients of two sites."""
    model = load_model(make_model(request.param), dtype="float32").model
    sites = resolve_sites(model, "down_proj", (1, 2))

    def sample(most=1000, texts=TEXTS, first=None):
        first = first or [len(BEGINNING) - 1] * len(texts)
        return joint_samples(model, sites, texts, first=first, seed=0, most=most)

    return sample


def test_texts_behind_one_beginning_give_what_whole_ones_give(sampled, monkeypatch):
    ways = []
    behind = joint._behind_one_beginning

    def noted(*args):
        ways.append(behind(*args))
        return ways[-1]

    monkeypatch.setattr(joint, "_PACK_TOKENS", 30)  # several packs
    monkeypatch.setattr(joint, "_behind_one_beginning", noted)
    found = sampled()
    assert ways[0] is not None
    monkeypatch.setattr(joint, "_behind_one_beginning", lambda *args: None)
    for one, other in zip(found, sampled(), strict=True):
        for a, b in zip(one, other, strict=True):
            assert len(a) == sum(len(text) - len(BEGINNING) for text in TEXTS)
            assert float(b.norm()) > 0
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_fewer_positions_are_some_of_all(sampled):
    texts = [text for text in TEXTS if len(text) > len(BEGINNING) + 1]
    first = [len(BEGINNING)] * len(texts)  # what was read before is the same in all
    (reads, writes), (some_reads, some_writes) = (
        sampled(most, texts, first) for most in (1000, 10)
    )
    for all_rows, some in zip((*reads, *writes), (*some_reads, *some_writes), strict=True):
        assert len(some) == 10
        at = [int((all_rows - row).abs().sum(dim=1).argmin()) for row in some]
        assert at == sorted(set(at))
        assert torch.allclose(all_rows[at], some, rtol=1e-5, atol=1e-6)


def test_what_follows_is_what_counts(sampled):
    """The gradient at a position is that of the tokens drawn from there on: none before it."""
    texts = [[*BEGINNING, 20, 21, third, 30] for third in (22, 23)]
    reads, writes = sampled(texts=texts)
    for rows in reads:
        assert torch.allclose(rows[:3], rows[4:7], rtol=1e-4, atol=1e-5)  # they read the same
        assert not torch.allclose(rows[3], rows[7], rtol=1e-2)
    for rows in writes:
        assert not torch.allclose(rows[:3], rows[4:7], rtol=1e-2)


def test_each_text_is_looked_at_from_its_own_place_whatever_it_begins_with(sampled, monkeypatch):
    monkeypatch.setattr(joint, "_BEGINNING", 3)
    texts = [*TEXTS[:6], [70, 71, 72, 73, 74, 75], [80, 81, 82, 83]]
    first = [*[len(BEGINNING) - 1 + (i % 2) * (len(t) > 7) for i, t in enumerate(texts[:6])], 4, 0]
    reads, _ = sampled(texts=texts, first=first)
    expected = {}
    for text, begin in zip(texts, first, strict=True):
        (alone, _), _ = sampled(texts=[text], first=[begin])
        assert len(alone) == len(text) - 1 - begin
        expected[tuple(text)] = alone
    most, others = texts[:6], texts[6:]
    ordered = [expected[tuple(t)] for part in (most, others) for t in sorted(part, key=len)]
    assert torch.allclose(reads[0], torch.cat(ordered), rtol=1e-3, atol=1e-4)
