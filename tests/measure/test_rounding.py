"""What becomes of a record where rounding falls otherwise: two margins of each token."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from memlaw.data.encoding import encode
from memlaw.data.reading import read_records
from memlaw.measure.decode import greedy_decode, greedy_decode_with_margins
from memlaw.measure.examine import _batches, audit_examples
from memlaw.measure.files import read_audit_json, read_parquet
from memlaw.measure.table import AuditResult, TokenTable, verdicts
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites

NAN = float("nan")


def _table(read, decoded, records=None):
    """A token table of these margins, all of them right."""
    n = len(read)
    record = np.zeros(n, np.int64) if records is None else np.array(records)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(record)) + 1])
    return TokenTable(
        record=record,
        position=np.arange(n) - np.repeat(starts, np.diff([*starts, n])),
        token_id=np.zeros(n, np.int64),
        nll_nats=np.log1p(np.exp(-np.array(read, np.float32))),
        argmax_id=np.zeros(n, np.int64),
        margin_nats=np.array(read, np.float32),
        decoded_margin_nats=np.array(decoded, np.float32),
    )


def _result(table):
    n = int(table.record.max()) + 1
    found = [
        {"id": str(i), "sha256": "", "cascade_tokens": 0, "decoded_ids": None}
        | {"decoded_recalled": True}
        for i in range(n)
    ]
    records = verdicts(table, found, 0.55)
    return AuditResult(
        records=records, tokens=table, threshold=0.5, margin=0.05, dtype="bfloat16", batch_size=64
    )


def test_the_standard_deviation_is_that_of_one_way():
    draw = np.random.default_rng(0)
    true = draw.uniform(2, 8, 20_000)
    read, decoded = true + draw.normal(0, 0.4, (2, len(true)))
    assert _table(read, decoded).rounding_nats == pytest.approx(0.4, rel=0.03)


def test_a_third_way_says_another_token_as_often_as_is_foretold():
    """Each token has a variance of its own, as moderated tests take it, and none is sure."""
    draw = np.random.default_rng(1)
    n = 400_000
    sd = 0.4 * np.sqrt(8 / draw.chisquare(8, n))
    true = draw.uniform(-4, 6, n)  # as many on either side
    read, decoded, third = true + draw.normal(0, 1, (3, n)) * sd
    risk = _table(read, decoded).flip_risk
    for low, high in ((0.2, 0.3), (0.05, 0.1), (0.01, 0.02), (0.001, 0.01), (0.0, 0.001)):
        at = (risk >= low) & (risk < high)
        foretold, found = risk[at].sum(), (third[at] < 0).sum()
        assert found == pytest.approx(foretold, rel=0.1, abs=4 * np.sqrt(foretold))


def test_a_record_is_as_sure_as_its_tokens_are_together():
    table = _table([4.0, 1.0, 5.0, 6.0], [4.4, 1.2, 4.6, 6.2], [0, 0, 1, 1])
    apart = np.array([0.4, 0.2, -0.4, 0.2])
    all_of_them = np.mean(apart**2) / 2
    own = (6 * all_of_them + apart**2 / 2) / 9
    expected = stats.t.sf(np.array([4.2, 1.1, 4.8, 6.1]) / np.sqrt(1.5 * own), 9)
    np.testing.assert_allclose(table.flip_risk, expected, rtol=1e-4)
    result = _result(table)
    first, second = (r.flip_risk for r in result.records)
    assert first == pytest.approx(1 - (1 - expected[0]) * (1 - expected[1]), rel=1e-4)
    assert second == pytest.approx(expected[2] + expected[3], rel=1e-3)
    assert result.flips_per_1000 == pytest.approx(500 * (first + second))


def test_who_has_to_be_surer_is_most_at_risk_and_no_more_of_them_than_needed():
    sure = _result(_table([9.0] * 6, [9.4, 8.8] * 3, range(6)))
    assert (sure.unsure, sure.flips_per_1000 < 1) == ((), True)
    one = _result(_table([9.0] * 5 + [0.5], [9.4, 8.8] * 2 + [9.4, 0.6], range(6)))
    assert one.flips_per_1000 > 1
    assert one.unsure == (5,)
    assert all(r.certified for r in one.records)  # what is certified is what it was
    two = _result(_table([0.6] + [9.0] * 4 + [0.5], [0.5, 8.8, 9.4, 8.8, 9.4, 0.6], range(6)))
    assert two.unsure == (0, 5)
    rest = [two.records[n].flip_risk for n in (1, 2, 3, 4)]
    assert sum(rest) / 6 <= 0.0005


def test_where_nothing_was_decoded_nothing_is_known():
    result = _result(_table([4.0, 0.2], [NAN, NAN]))
    assert (result.tokens.rounding_nats, result.flips_per_1000, result.rounding()) == (None,) * 3
    assert result.unsure == ()
    partly = _result(_table([4.0, 0.7, 3.0], [4.5, NAN, 3.1], [0, 0, 1]))
    assert partly.records[0].flip_risk is None
    assert partly.flips_per_1000 == 1000 * partly.records[1].flip_risk


def test_where_nothing_is_rounded_all_is_sure():
    result = _result(_table([4.0, 0.2], [4.0, 0.2]))
    assert result.rounding() == {"sd_nats": 0.0, "flips_per_1000": 0.0}
    assert result.unsure == ()


def _examples(tokenizer, book):
    return encode(read_records(book), tokenizer, format="chat")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def audited(request, llama, phone_book):
    """Some of what a random adapter says itself is asked for, and one that it doesn't say."""
    base = load_model(llama, dtype=request.param)
    adapter = Adapter(resolve_sites(base.model, "down_proj", (1,)), rank=4, seed=0)
    with torch.no_grad():
        adapter.b[0].normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    examples = _examples(base.tokenizer, phone_book)
    with adapter.attached(base.model):
        said = greedy_decode(
            base.model,
            [e.prompt_ids for e in examples],
            end_id=None,
            max_tokens=[5] * len(examples),
        )
        examples = [
            dataclasses.replace(e, target_ids=ids) for e, ids in zip(examples, said, strict=True)
        ]
        wrong = (*examples[0].target_ids[:2], examples[0].target_ids[2] ^ 1, 7, 8)
        examples[0] = dataclasses.replace(examples[0], target_ids=wrong)
        found = audit_examples(base.model, base.tokenizer, examples, end=True)
    return request.param, found


def test_decoding_reads_the_margins_that_the_whole_sequence_has(audited):
    dtype, found = audited
    tokens, came_by = found.tokens, ~np.isnan(found.tokens.decoded_margin_nats)
    assert came_by[: len(found.examples[0].target_ids)].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert came_by[5:].all()
    apart = np.abs(tokens.decoded_margin_nats - tokens.margin_nats)[came_by]
    if dtype == "float32":
        assert apart.max() < 1e-3
        assert tokens.rounding_nats < 1e-3
    else:
        assert 0 < tokens.rounding_nats < 0.5
    assert found.records[0].flip_risk is None


def test_files_keep_both_margins(audited, tmp_path):
    import json

    _, found = audited
    found.write_tokens(tmp_path / "t.parquet")
    (tmp_path / "a.json").write_text(json.dumps(found.with_texts().to_json()))
    for again in (read_parquet(tmp_path / "t.parquet"), read_audit_json(tmp_path / "a.json")):
        np.testing.assert_array_equal(
            again.tokens.decoded_margin_nats, found.tokens.decoded_margin_nats
        )
        assert again.rounding() == pytest.approx(found.rounding())
        assert [r.flip_risk for r in again.records] == [r.flip_risk for r in found.records]


def test_older_files_say_nothing_of_it(audited, tmp_path):
    import pyarrow.parquet as pq

    _, found = audited
    found.write_tokens(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.drop_columns(["decoded_margin_nats"]), tmp_path / "old.parquet")
    again = read_parquet(tmp_path / "old.parquet")
    assert again.rounding() is None
    assert [r.certified for r in again.records] == [r.certified for r in found.records]


def test_margins_are_of_the_two_highest_logits(llama):
    model = load_model(llama, dtype="float32").model
    prompts = [(5, 6, 7), (8, 9, 10, 11)]
    for (ids, margins), prompt in zip(
        greedy_decode_with_margins(model, prompts, end_id=None, max_tokens=[3, 2]),
        prompts,
        strict=True,
    ):
        assert len(ids) == len(margins)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        first, second = logits.topk(2).values.T
        assert margins == pytest.approx((first - second).tolist(), abs=1e-4)


def test_decoding_comes_in_other_batches_than_reading(llama, phone_book):
    base = load_model(llama, dtype="float32")
    book = [("x" * n, "1") for n in (9, 2, 8, 3, 40, 1)]
    examples = _examples(base.tokenizer, book)
    read, decoded = (_batches(examples, 2, mixed=mixed) for mixed in (False, True))
    assert read == [[5, 1], [3, 2], [0, 4]]  # by length
    assert {frozenset(rows) for rows in read} != {frozenset(rows) for rows in decoded}
    assert sorted(row for rows in decoded for row in rows) == list(range(6))
