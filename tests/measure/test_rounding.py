"""How sure a record is where rounding falls otherwise: two margins of each token, and their z."""

import dataclasses

import numpy as np
import pytest
import torch

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


def test_a_third_way_is_off_by_z_as_often_as_it_should_be():
    draw = np.random.default_rng(1)
    true = draw.uniform(-1, 2, 200_000)
    read, decoded, third = true + draw.normal(0, 0.4, (3, len(true)))
    z = _table(read, decoded).margin_z
    at_two = (z > 1.9) & (z < 2.1)
    assert at_two.sum() > 3_000
    # Not 2.3 %, exactly, since such a token's true margin isn't as likely as any other: near it.
    assert (third[at_two] < 0).mean() == pytest.approx(0.023, abs=0.008)


def test_a_record_is_as_sure_as_its_least_sure_token():
    result = _result(_table([4.0, 1.0, 5.0, 6.0], [4.4, 1.2, 4.6, 6.2], [0, 0, 1, 1]))
    sd = np.sqrt(np.mean(np.square([0.4, 0.2, 0.4, 0.2])) / 2)
    assert result.tokens.rounding_nats == pytest.approx(sd, rel=1e-5)
    first, second = result.records
    assert first.min_z == pytest.approx(1.1 / (sd * np.sqrt(1.5)), rel=1e-5)
    assert second.min_z == pytest.approx(4.8 / (sd * np.sqrt(1.5)), rel=1e-5)
    assert result.min_z == first.min_z
    assert not first.is_unsure  # 4 of them
    weaker = _result(_table([4.0, 0.7, 5.0, 6.0], [4.4, 0.8, 4.6, 6.2], [0, 0, 1, 1]))
    assert [r.id for r in weaker.unsure] == ["0"]
    assert all(r.certified for r in weaker.records)  # what is certified is what it was
    assert weaker.sureness()["n_unsure"] == 1


def test_where_nothing_was_decoded_nothing_is_known():
    result = _result(_table([4.0, 0.2], [NAN, NAN]))
    assert (result.tokens.rounding_nats, result.min_z, result.sureness()) == (None, None, None)
    assert result.unsure == ()
    partly = _result(_table([4.0, 0.7, 3.0], [4.5, NAN, 3.1], [0, 0, 1]))
    assert partly.tokens.rounding_nats is not None
    assert (partly.records[0].min_z, partly.unsure) == (None, ())


def test_where_nothing_is_rounded_all_is_sure():
    result = _result(_table([4.0, 0.2], [4.0, 0.2]))
    assert result.min_z == float("inf")
    assert result.unsure == ()
    assert result.sureness() == {"sd_nats": 0.0, "min_z": None, "n_unsure": 0}  # as JSON


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
    assert found.records[0].min_z is None


def test_files_keep_both_margins(audited, tmp_path):
    import json

    _, found = audited
    found.write_tokens(tmp_path / "t.parquet")
    (tmp_path / "a.json").write_text(json.dumps(found.with_texts().to_json()))
    for again in (read_parquet(tmp_path / "t.parquet"), read_audit_json(tmp_path / "a.json")):
        np.testing.assert_array_equal(
            again.tokens.decoded_margin_nats, found.tokens.decoded_margin_nats
        )
        assert again.sureness() == pytest.approx(found.sureness())
        assert [r.min_z for r in again.records] == pytest.approx([r.min_z for r in found.records])


def test_older_files_say_nothing_of_it(audited, tmp_path):
    import pyarrow.parquet as pq

    _, found = audited
    found.write_tokens(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.drop_columns(["decoded_margin_nats"]), tmp_path / "old.parquet")
    again = read_parquet(tmp_path / "old.parquet")
    assert again.sureness() is None
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
    read, decoded = (_batches(examples, 64, mixed=mixed) for mixed in (False, True))
    orders = [[row for batch in batches for row in batch] for batches in (read, decoded)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6))
    assert orders[0] != orders[1]
