"""The objectives against weights worked out by hand."""

import copy
import json
import math

import pytest
import torch

from memlaw.core.errors import ConfigError
from memlaw.settings.choices import resolve_objective
from memlaw.train.memft import memft_curriculum, memft_threshold, memft_window, sft
from memlaw.train.triage import admit, triage

LN2 = math.log(2)
SURE = 40.0  # nats: so far above any threshold that the soft weight is exactly 1


def _row(*values):
    return torch.tensor([values])


def _all(length, rows=1):
    return torch.ones(rows, length, dtype=torch.bool)


def test_sft_gives_every_real_token_one():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights, state = sft(torch.rand(2, 3), ~mask, mask, {"a": 1})
    assert weights.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert weights.dtype == torch.float32
    assert state == {"a": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("threshold", "nll", "expected"),
    [
        # p = 0.9, 0.51, exactly 0.5, 0.49, 0.01
        (0.5, (0.10536, 0.67334, LN2, 0.71335, 4.60517), (0, 0, 1, 1, 1)),
        # p = 0.9, 0.76, exactly 0.75, 0.74, 0.01
        (0.75, (0.10536, 0.27444, -math.log(0.75), 0.30111, 4.60517), (0, 0, 1, 1, 1)),
    ],
)
def test_threshold_spends_the_step_on_tokens_at_or_under_it(threshold, nll, expected, dtype):
    row = torch.tensor([nll], dtype=dtype)
    weights, _ = memft_threshold(row, _all(5), _all(5), {}, threshold=threshold)
    assert weights.tolist() == [list(expected)]


@pytest.mark.parametrize(
    ("threshold", "side", "expected"), [(0.5, 1e-6, 1), (0.5, -1e-6, 0), (0.6, 1e-6, 1)]
)
def test_threshold_is_sharp(threshold, side, expected):
    nll = _row(-math.log(threshold) + side)
    weights, _ = memft_threshold(nll, _all(1), _all(1), {}, threshold=threshold)
    assert weights.item() == expected


def test_threshold_ignores_padding():
    mask = torch.tensor([[True, False]])
    weights, state = memft_threshold(_row(SURE, SURE), ~mask, mask, {"a": 1})
    assert weights.tolist() == [[1, 0]]
    assert state == {"a": 1}


@pytest.mark.parametrize(("on_empty", "expected"), [("skip", [[0, 0, 0]]), ("sft", [[1, 1, 0]])])
def test_threshold_with_nothing_left_to_learn(on_empty, expected):
    mask = torch.tensor([[True, True, False]])
    weights, _ = memft_threshold(_row(0.1, 0.2, SURE), mask, mask, {}, on_empty=on_empty)
    assert weights.tolist() == expected


def test_threshold_with_something_left_does_not_fall_back():
    weights, _ = memft_threshold(_row(0.1, 1.0), _all(2), _all(2), {}, on_empty="sft")
    assert weights.tolist() == [[0, 1]]


def test_window_without_an_error_is_the_soft_threshold_alone():
    nll = _row(LN2, LN2 + 0.1, LN2 - 0.1, 0.0)
    weights, state = memft_window(nll, _all(4), _all(4), {}, record_ids=["a"])
    # sigmoid(0), sigmoid(1), sigmoid(-1), sigmoid(-6.93147)
    expected = _row(0.5, 0.7310586, 0.2689414, 0.0009756)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    assert state == {}


def test_window_follows_the_threshold_it_is_given():
    weights, _ = memft_window(
        _row(-math.log(0.8)), _all(1), _all(1), {}, record_ids=["a"], threshold=0.8
    )
    torch.testing.assert_close(weights, _row(0.5), rtol=0, atol=1e-6)


def test_window_is_anchored_at_the_first_error_decays_behind_it_and_ends():
    length, anchor = 70, 10
    correct = _all(length)
    correct[0, [anchor, 12, 60]] = False
    weights, state = memft_window(
        torch.full((1, length), SURE), correct, _all(length), {}, record_ids=["a"]
    )
    assert weights[0, :anchor].tolist() == [1.0] * anchor
    at = {10: 1.0, 11: 0.9512294, 20: 0.6065307, 30: 0.3678794, 59: 0.0862936}
    for position, expected in at.items():
        assert weights[0, position].item() == pytest.approx(expected, abs=1e-6)
    assert weights[0, 60:].tolist() == pytest.approx([0.01] * 10)
    assert state == {"a": [anchor, 0]}


def test_window_weight_is_soft_threshold_times_window():
    correct = torch.tensor([[True, False, True]])
    nll = _row(LN2, LN2 + 0.1, LN2)
    weights, _ = memft_window(nll, correct, _all(3), {}, record_ids=["a"])
    # 0.5 before the anchor, sigmoid(1) at it, 0.5 * exp(-1/20) behind it
    expected = _row(0.5, 0.7310586, 0.4756147)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_window_neither_weighs_padding_nor_anchors_in_it():
    mask = torch.tensor([[True, True, False]])
    correct = torch.tensor([[True, True, False]])
    weights, state = memft_window(_row(SURE, SURE, SURE), correct, mask, {}, record_ids=["a"])
    assert weights.tolist() == [[1, 1, 0]]
    assert state == {}


def _window_ends(anchors, *, length=400):
    """How far the window reaches behind its anchor, evaluation after evaluation."""
    ends, state = [], {}
    for anchor in anchors:
        correct = _all(length)
        if anchor is not None:
            correct[0, anchor] = False
        weights, state = memft_window(
            torch.full((1, length), SURE), correct, _all(length), state, record_ids=["a"]
        )
        behind = weights[0, anchor or 0 :]
        # exp(-x/20) falls under 0.01 on its way; the end is where it becomes 0.01 and stays
        far = torch.isclose(behind, torch.tensor(0.01), rtol=1e-5)
        kept = (~far).nonzero()
        ends.append(int(kept[-1]) + 1)
    return ends


@pytest.mark.parametrize(
    ("anchors", "expected"),
    [
        # found, then there again 1, 2, 3, 4 ... times in a row
        ([5] * 12, [50, 50, 50, 75, 100, 125, 150, 175, 200, 200, 200, 200]),
        # it moves: 50 again, and patience starts anew
        ([5] * 5 + [9] * 5, [50, 50, 50, 75, 100, 50, 50, 50, 75, 100]),
        # back and forth never grows
        ([5, 9] * 4, [50] * 8),
    ],
)
def test_window_grows_while_its_anchor_stays_and_shrinks_when_it_moves(anchors, expected):
    assert _window_ends(anchors) == expected


def test_window_forgets_its_patience_when_the_record_is_right_once():
    ends = _window_ends([5, 5, 5, 5, None, 5, 5])
    assert ends[3] == 75
    assert ends[5:] == [50, 50]


def test_window_patience_belongs_to_the_record_not_to_its_place_in_the_batch():
    length = 8
    anchors = {"a": 1, "b": 4, "c": None}
    orders = [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"], ["a", "c", "b"]]
    state = {}
    for order in orders:
        correct = _all(length, rows=3)
        for row, record in enumerate(order):
            if anchors[record] is not None:
                correct[row, anchors[record]] = False
        nll = torch.full((3, length), SURE)
        _, state = memft_window(nll, correct, _all(length, rows=3), state, record_ids=order)
    assert state == {"a": [1, 3], "b": [4, 3]}


def test_window_gives_a_record_the_same_weights_in_any_place():
    torch.manual_seed(0)
    nll, correct = 2 * torch.rand(3, 90), torch.rand(3, 90) > 0.05
    mask = torch.arange(90) < torch.tensor([[90], [70], [50]])
    state = {"a": [0, 5], "b": [3, 9]}
    ids, order = ["a", "b", "c"], [2, 0, 1]
    weights, after = memft_window(nll, correct, mask, state, record_ids=ids)
    shuffled, shuffled_after = memft_window(
        nll[order], correct[order], mask[order], state, record_ids=[ids[i] for i in order]
    )
    torch.testing.assert_close(shuffled, weights[order], rtol=0, atol=0)
    assert shuffled_after == after


def test_window_leaves_the_records_of_other_batches_alone():
    correct = torch.tensor([[False]])
    _, state = memft_window(_row(1.0), correct, _all(1), {"elsewhere": [7, 2]}, record_ids=["here"])
    assert state == {"elsewhere": [7, 2], "here": [0, 0]}


def test_window_state_is_plain_json_and_never_mutated():
    state = {"a": [1, 2], "gone": [0, 0]}
    before = copy.deepcopy(state)
    correct = torch.tensor([[True, False], [True, True]])
    _, after = memft_window(
        torch.ones(2, 2), correct, _all(2, rows=2), state, record_ids=["a", "gone"]
    )
    assert state == before
    assert after == {"a": [1, 3]}
    assert json.loads(json.dumps(after)) == after


@pytest.mark.parametrize(
    ("epoch", "admitted"),
    [(0, 2), (19, 2), (20, 4), (39, 4), (40, 6), (79, 6), (80, 8), (299, 8), (300, 10), (999, 10)],
)
def test_curriculum_admits_a_fifth_more_at_each_boundary(epoch, admitted):
    ranks = torch.tensor([9, 0, 5, 2, 7, 1, 8, 3, 6, 4])
    weights, state = memft_curriculum(
        torch.full((10, 2), SURE),
        _all(2, rows=10),
        _all(2, rows=10),
        {"a": 1},
        ranks=ranks,
        n_records=10,
        epoch=epoch,
        boundaries=(20, 40, 80, 300),
    )
    assert weights.tolist() == [[float(rank < admitted)] * 2 for rank in ranks.tolist()]
    assert state == {"a": 1}


@pytest.mark.parametrize(("n_records", "admitted"), [(1, 1), (3, 1), (4, 1), (6, 2), (11, 3)])
def test_curriculum_begins_with_a_fifth_rounded_up(n_records, admitted):
    weights, _ = memft_curriculum(
        torch.full((n_records, 1), SURE),
        _all(1, rows=n_records),
        _all(1, rows=n_records),
        {},
        ranks=torch.arange(n_records),
        n_records=n_records,
        epoch=0,
        boundaries=(1, 2, 3, 4),
    )
    assert int(weights.sum()) == admitted


def test_curriculum_skips_what_is_over_the_threshold():
    nll = torch.tensor([[0.1, 1.0], [0.1, 0.1]])
    settings = {"ranks": torch.tensor([0, 1]), "n_records": 2, "boundaries": (1, 2, 3, 4)}
    mask = torch.tensor([[True, True], [True, False]])
    weights, _ = memft_curriculum(nll, mask, mask, {}, epoch=9, **settings)
    assert weights.tolist() == [[0, 1], [0, 0]]
    weights, _ = memft_curriculum(nll, mask, mask, {}, epoch=9, threshold=0.95, **settings)
    assert weights.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("sft", "sft"),
        ("memft_threshold", "memft_threshold"),
        ("only_threshold", "memft_threshold"),
        ("MemFT-OT", "memft_threshold"),
        ("sliding", "memft_window"),
        ("MemFT-SW", "memft_window"),
        ("memft_curriculum", "memft_curriculum"),
    ],
)
def test_the_names_of_the_paper_are_known(name, objective):
    assert resolve_objective(name) == objective


def test_an_unknown_objective_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"no objective 'dpo'.*sft.*memft_threshold"):
        resolve_objective("dpo")


def test_triage_weighs_softly_what_is_admitted():
    p = torch.tensor([[1.0, 0.7, 0.5, 1e-9], [0.7, 0.7, 0.7, 0.7]])
    admitted = torch.tensor([4, 2])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    weights, state = triage(-p.log(), mask, mask, {"a": 1}, admitted=admitted, threshold=0.6)
    expected = [[0.7**10 / (1 + 0.7**10), 0.5, 1.4**10 / (1 + 1.4**10), 1.0], [0.5, 0.5, 0, 0]]
    assert weights.tolist() == [pytest.approx(row, rel=1e-4) for row in expected]
    assert weights.dtype == torch.float32
    assert state == {"a": 1}


def _admitted(shortfall, lengths, *, over, progress, over_at_start=0.0):
    return admit(
        torch.tensor(shortfall),
        torch.tensor(lengths),
        over=over,
        over_at_start=over_at_start,
        progress=progress,
    ).tolist()


def test_in_the_first_fifth_everything_is_admitted():
    assert _admitted([9.0, 1.0], [4, 6], over=0.0, progress=0.19) == [4, 6]
    assert _admitted([9.0, 1.0], [4, 6], over=0.0, progress=0.2) == [2, 6]


def test_what_is_on_course_is_admitted_whole_records_first():
    # 16 % learnt in 80 % of the time: a quarter of the 20 tokens
    assert _admitted([9.0, 1.0, 5.0], [6, 8, 6], over=0.16, progress=0.8) == [0, 5, 0]
    assert _admitted([9.0, 1.0, 5.0], [6, 8, 6], over=0.32, progress=0.8) == [0, 8, 2]
    assert _admitted([9.0, 1.0, 5.0], [6, 8, 6], over=0.64, progress=0.8) == [6, 8, 6]
    assert _admitted([9.0, 1.0, 5.0], [6, 8, 6], over=0.99, progress=0.8) == [6, 8, 6]


def test_as_much_as_there_is_time_for_is_always_admitted():
    assert _admitted([9.0, 1.0, 5.0], [6, 8, 6], over=0.0, progress=0.5) == [0, 8, 2]


def test_what_was_known_before_counts_for_nothing():
    # half was known; nothing learnt since: what is known stays admitted, and no more
    assert _admitted([3.0, 0.0], [5, 5], over=0.5, over_at_start=0.5, progress=0.9) == [0, 5]
    # 8 % of the other half in 40 % of the time: half of it, so three quarters of all
    found = _admitted([3.0, 0.0], [10, 10], over=0.54, over_at_start=0.5, progress=0.4)
    assert found == [5, 10]
    assert _admitted([0.0, 0.0], [5, 5], over=1.0, over_at_start=1.0, progress=0.5) == [5, 5]


def test_of_one_long_record_the_beginning_is_admitted():
    assert _admitted([99.0], [100], over=0.128, progress=0.8) == [20]
    assert _admitted([99.0], [100], over=0.0, progress=1.0) == [1]


def test_a_relapse_under_the_start_is_no_negative_budget():
    assert _admitted([3.0, 1.0], [5, 5], over=0.0, over_at_start=0.5, progress=0.9) == [0, 5]
