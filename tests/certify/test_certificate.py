"""The certificate: what it says, what it keeps to itself, and what speaks against it."""

import dataclasses
import functools
import json
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

import memlaw
from memlaw.certify.certificate import (
    CertifiedRecord,
    make_certificate,
    read_certificate,
    records_sha256,
)
from memlaw.certify.check import CertificateCheck
from memlaw.certify.joined import Part, joined_certificate, joined_mismatches
from memlaw.certify.mismatches import mismatches, unchecked
from memlaw.cli.verdicts import certificate_verdict
from memlaw.core.commitment import commitment
from memlaw.core.criterion import of_thousand
from memlaw.core.errors import CertificateError
from memlaw.core.files import write_json
from memlaw.measure.damage import Damage
from memlaw.measure.examine import Audit
from memlaw.measure.generality import Generality
from memlaw.measure.harm import KINDS
from memlaw.measure.leaks import KindCounts, Leaks
from memlaw.measure.table import RecordVerdict, TokenTable
from memlaw.measure.unchanged import Unchanged

_write = functools.partial(memlaw.write, specificity=False)

KEY = bytes(range(32))
HASHES = {"base_sha256": "b" * 64, "tokenizer_sha256": "t" * 64, "adapter_sha256": "a" * 64}
DAMAGE = Damage(
    delta_nll_nats=0.1,
    delta_nll_ci95=(0.0, 0.2),
    kl_nats=0.3,
    kl_ci95=(0.2, 0.4),
    base_nll_nats=2.0,
    n_windows=2,
    n_tokens=254,
    text="some",
    text_sha256="d" * 64,
)


def _verdict(name, **changes):
    usual = {
        "id": f"book:{name}",
        "sha256": name * 64,
        "n_tokens": 3,
        "min_p": 0.75,
        "n_under": 0,
        "argmax_recalled": True,
        "decoded_recalled": True,
        "first_failure": None,
        "cascade_tokens": 0,
        "flip_risk": None,
        "decoded_ids": (1, 2, 3),
    }
    return RecordVerdict(**usual | changes)


FAILED = {"n_under": 1, "min_p": 0.25, "decoded_recalled": False, "argmax_recalled": False}


def _audit(*records, **changes):
    none = np.zeros(0)
    table = TokenTable(
        record=none,
        position=none,
        token_id=none,
        nll_nats=none,
        argmax_id=none,
        margin_nats=none,
        decoded_margin_nats=none,
    )
    usual = {"threshold": 0.5, "margin": 0.05, "dtype": "float32", "batch_size": 16}
    return Audit(examples=(), tokenizer=None, records=records, tokens=table, **usual | changes)


def _certificate(audit, **more):
    return make_certificate(
        audit,
        {"damage": DAMAGE},
        key=KEY,
        device="cpu",
        prompt_format="chat",
        base_model="some/model",
        n_parameters=17,
        versions={"memlaw": "0"},
        **HASHES,
        **more,
    )


def _named(name):
    return commitment(KEY, name * 64)


BOTH = _audit(_verdict("1"), _verdict("2"))


def test_a_certificate_says_what_was_found():
    certificate = _certificate(_audit(_verdict("1"), _verdict("2", **FAILED)))
    assert not certificate.certified
    assert (certificate.n_records, certificate.n_certified) == (2, 1)
    assert certificate.statement.startswith("1 of 2 records are certified: computed in float32")
    assert "at least 0.55 " in certificate.statement
    assert certificate.records == (
        CertifiedRecord(
            id="book:1",
            commitment=_named("1"),
            certified=True,
            recalled=True,
            min_p=0.75,
            n_tokens=3,
        ),
        CertifiedRecord(
            id="book:2",
            commitment=_named("2"),
            certified=False,
            recalled=False,
            min_p=0.25,
            n_tokens=3,
        ),
    )
    age = datetime.now(UTC) - datetime.fromisoformat(certificate.created)
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("verdict", "certified", "recalled"),
    [
        ({}, True, True),
        ({"n_under": 1}, False, True),
        ({"decoded_recalled": False}, False, False),
        ({"decoded_recalled": None}, False, True),
        ({"decoded_recalled": None, "argmax_recalled": False}, False, False),
        ({"argmax_recalled": False}, True, True),
    ],
)
def test_a_record_needs_both_witnesses(verdict, certified, recalled):
    record = _verdict("1", **verdict)
    assert (record.certified, record.recalled) == (certified, recalled)
    assert _audit(record).certified is certified


@pytest.mark.parametrize(
    ("argmax", "decoded", "disagrees"),
    [(True, True, False), (True, False, True), (False, True, True), (True, None, False)],
)
def test_witnesses_that_differ_are_reported(argmax, decoded, disagrees):
    record = _verdict("1", argmax_recalled=argmax, decoded_recalled=decoded)
    assert record.disagrees is disagrees
    assert _audit(record).disagreements == ((record,) if disagrees else ())


def test_the_hash_of_the_records_does_not_depend_on_their_order():
    assert records_sha256(["1", "2", "3"]) == records_sha256(["3", "1", "2"])
    assert records_sha256(["1", "2"]) != records_sha256(["1", "2", "3"])
    assert records_sha256(["1", "2"]) != records_sha256(["12"])


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    certificate = _certificate(BOTH)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(certificate.to_json()))
    back = read_certificate(path)
    assert back.records == certificate.records
    assert json.dumps(back.to_json()) == json.dumps(certificate.to_json())


@pytest.mark.parametrize(
    "harms", [{"damage": DAMAGE.to_json()}, {"teapots": {"n": 3}}], ids=["twice", "unknown"]
)
def test_a_certificate_that_claims_a_harm_twice_or_one_unknown_is_refused(tmp_path, harms):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(_certificate(BOTH).to_json() | {"harms": harms}))
    with pytest.raises(CertificateError, match="is not a certificate"):
        read_certificate(path)


@pytest.mark.slow
def test_no_text_of_the_records_is_in_the_certificate_or_beside_it(llama, phone_book, tmp_path):
    out = tmp_path / "out"
    _write(phone_book, out, model=str(llama), max_epochs=300, retention=0)
    for name in ("certificate.json", "run.json", "README.md"):
        text = (out / name).read_text(encoding="utf-8")
        for prompt, completion in phone_book:
            assert prompt not in text
            assert completion not in text


# ---------------------------------------------------------------- mismatches


def _found(audit, certificate=None, **hashes):
    return mismatches(certificate or _certificate(BOTH), audit, {}, key=KEY, **HASHES | hashes)


def test_the_same_measurement_matches():
    assert _found(BOTH) == []
    assert _found(_audit(_verdict("2"), _verdict("1"))) == []


def test_a_lower_p_that_is_still_over_the_line_matches():
    assert _found(_audit(_verdict("1", min_p=0.56), _verdict("2"))) == []


@pytest.mark.parametrize(
    ("hash", "what"),
    [
        ("base_sha256", "the base model"),
        ("tokenizer_sha256", "the tokenizer"),
        ("adapter_sha256", "the adapter"),
    ],
)
def test_another_hash_is_named(hash, what):
    (line,) = _found(BOTH, **{hash: "f" * 64})
    assert line == (
        f"{what} is not the certified one: its hash is {'f' * 12}…, not {HASHES[hash][:12]}…"
    )


def test_another_dtype_is_named():
    found = _found(_audit(_verdict("1"), _verdict("2"), dtype="bfloat16"))
    assert found == ["measured in bfloat16, but certified for float32"]


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            {"n_under": 2, "min_p": 0.54},
            "book:1: certified, but now its lowest p is 0.540 and decoding agrees",
        ),
        (
            {"decoded_recalled": False},
            "book:1: certified, but now its lowest p is 0.750 and decoding differs",
        ),
    ],
)
def test_a_record_that_is_certified_no_more_is_named(now, line):
    assert _found(_audit(_verdict("1", **now), _verdict("2"))) == [line]


def test_missing_and_added_records_are_named():
    assert _found(_audit(_verdict("1"), _verdict("3"))) == [
        "book:2: certified, but not in these records (changed or removed)",
        "book:3: not covered by the certificate",
    ]


def test_a_record_that_was_recited_but_is_no_more_is_named():
    before = _certificate(_audit(_verdict("1", n_under=1)))
    assert _found(_audit(_verdict("1", n_under=1)), before) == []
    now = _audit(_verdict("1", n_under=1, decoded_recalled=False))
    assert _found(now, before) == ["book:1: recited when certified, but not now"]


def test_a_failure_that_is_admitted_is_no_mismatch():
    audit = _audit(_verdict("1"), _verdict("2", **FAILED))
    assert _found(audit, _certificate(audit)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"n_records": 3},
        {"n_certified": 1},
        {"certified": False},
        {"records_sha256": "0" * 64},
    ],
)
def test_totals_that_contradict_the_lines_are_found(change):
    doctored = dataclasses.replace(_certificate(BOTH), **change)
    (line,) = _found(BOTH, doctored)
    assert line.startswith("the certificate contradicts itself")


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "17",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "records": []}',
        '{"format": 1, "records": 5}',
        '{"format": 1, "records": ["a"]}',
    ],
)
def test_what_is_no_certificate_is_refused(tmp_path, text):
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(CertificateError, match=r"certificate\.json is not a certificate"):
        read_certificate(path)


def test_a_number_too_long_to_be_one_is_refused(tmp_path):
    path = tmp_path / "certificate.json"
    damage = DAMAGE.to_json() | {"delta_nll_ci95": [-(10**400), 10**400]}
    path.write_text(json.dumps(_certificate(BOTH).to_json() | {"damage": damage}))
    with pytest.raises(CertificateError, match=r"is not a certificate .OverflowError"):
        read_certificate(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "certificate.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CertificateError, match="is not a certificate"):
        read_certificate(path)


@pytest.mark.parametrize("name", ["no.json", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(CertificateError, match="can't be read"):
        read_certificate(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", "0.5"),
        ("threshold", None),
        ("n_records", 2.5),
        ("n_certified", True),
        ("certified", "yes"),
        ("certified", 1),
        ("dtype", "float8"),
        ("prompt_format", "poem"),
        ("base_sha256", 5),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(tmp_path, field, value):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(_certificate(BOTH).to_json() | {field: value}))
    with pytest.raises(CertificateError, match=f"not a certificate .*{field} is"):
        read_certificate(path)


@pytest.mark.parametrize("removed", ["statement", "records", "versions", "damage"])
def test_a_field_that_is_not_there_is_refused(tmp_path, removed):
    content = _certificate(BOTH).to_json()
    del content[removed]
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CertificateError, match=removed):
        read_certificate(path)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(_certificate(BOTH).to_json() | {"format": 99}))
    with pytest.raises(CertificateError, match="format 99, but this version reads 1 and 2"):
        read_certificate(path)


# ------------------------------------------------------------ what rounding may take


def _rounded(name, risk, sd_nats=0.4, **more):
    """The certificate of an adapter with one record, a margin of which was read twice."""
    one = np.array([0])
    margins = np.array([4.0, 4.0 + sd_nats * 2**0.5], np.float32)
    table = TokenTable(
        record=one,
        position=one,
        token_id=one,
        nll_nats=np.array([0.01], np.float32),
        argmax_id=one,
        margin_nats=margins[:1],
        decoded_margin_nats=margins[1:],
    )
    audit = dataclasses.replace(_audit(_verdict(name, flip_risk=risk)), tokens=table)
    return _certificate(audit, **more)


def test_a_certificate_says_what_rounding_may_take(tmp_path):
    certificate = _rounded("1", 0.002)
    assert certificate.rounding == {
        "sd_nats": pytest.approx(0.4, rel=1e-5),
        "flips_per_1000": pytest.approx(2.0),
    }
    assert (
        "deviation of 0.4 nats: of 1,000 answers that are right here 2 are expected"
        in certificate.statement
    )
    write_json(tmp_path / "certificate.json", certificate.to_json())
    assert read_certificate(tmp_path / "certificate.json").rounding == certificate.rounding
    assert "rounding" not in _certificate(BOTH).to_json()


@pytest.mark.parametrize(
    "rounding",
    [
        [],
        {"sd_nats": 0.4},
        {"sd_nats": 0.4, "flips_per_1000": None},
        {"sd_nats": True, "flips_per_1000": 1.0},
        {"sd_nats": 0.4, "flips_per_1000": float("nan")},
        {"sd_nats": 0.4, "flips_per_1000": float("inf")},
        {"sd_nats": -0.4, "flips_per_1000": 1.0},
        {"sd_nats": 0.4, "flips_per_1000": 1.0, "more": 2},
    ],
)
def test_of_rounding_nothing_else_is_read(tmp_path, rounding):
    content = _rounded("1", 0.002).to_json() | {"rounding": rounding}
    (tmp_path / "certificate.json").write_text(json.dumps(content))
    with pytest.raises(CertificateError, match="rounding"):
        read_certificate(tmp_path / "certificate.json")


def _part(name, risk, sd_nats):
    record = SimpleNamespace(sha256=name * 64)
    return Part(_rounded(name, risk, sd_nats, tokenizer="some/words"), KEY, [record])


def test_of_several_adapters_it_is_the_mean_of_all_answers():
    parts = {"a": _part("1", 0.001, 0.3), "b": _part("2", 0.005, 0.5)}
    whole = joined_certificate(parts, KEY)
    assert whole.rounding == {
        "sd_nats": pytest.approx(0.5, rel=1e-5),
        "flips_per_1000": pytest.approx(3.0),
    }
    assert whole.statement.count("are expected to be others") == 1
    assert whole.statement.count("The tokenizer is some/words") == 1
    assert "deviation of 0.5 nats: of 1,000 answers that are right here 3 are" in whole.statement
    of_parts = {name: part.certificate for name, part in parts.items()}
    assert joined_mismatches(whole, of_parts) == []
    better = dataclasses.replace(whole, rounding={"sd_nats": 0.1, "flips_per_1000": 0.0})
    (said,) = joined_mismatches(better, of_parts)
    assert "rounding" in said


def test_of_several_adapters_nothing_is_said_where_one_says_nothing():
    silent = dataclasses.replace(_rounded("2", 0.005), rounding=None)
    parts = {
        "a": _part("1", 0.001, 0.3),
        "b": Part(silent, KEY, [SimpleNamespace(sha256="2" * 64)]),
    }
    whole = joined_certificate(parts, KEY)
    assert whole.rounding is None
    assert "are expected to be others" not in whole.statement


@pytest.mark.parametrize(("now", "is_found"), [(0.0095, False), (0.011, True)])
def test_a_forecast_far_from_what_is_found_is_a_mismatch(now, is_found):
    then, audit = _rounded("1", 0.0), _audit(_verdict("1", flip_risk=now))
    found = mismatches(then, audit, {"damage": DAMAGE}, key=KEY, **HASHES)
    assert [said for said in found if "others in other batches, not under 0.01" in said] == found
    assert bool(found) == is_found


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "under 0.01"), (3e-35, "under 0.01"), (0.336, "0.34"), (9.96, "10"), (153.4, "153")],
)
def test_so_many_of_a_thousand(n, said):
    assert of_thousand(n) == said


# ---------------------------------------------------------------- the second verdict


def _figures(
    delta=0.005,
    half=0.002,
    unchanged=70,
    in_form=0,
    kl=0.006,
    text_kl=0.006,
    leaks=0,
    made_up=2,
    n=100,
):
    text = {"base_nll_nats": 3.0, "n_windows": 2, "n_tokens": 10, "text": "a text"}
    return {
        "damage": Damage(
            delta_nll_nats=delta,
            delta_nll_ci95=(delta - half, delta + half),
            kl_nats=text_kl,
            kl_ci95=(0.0, 2 * text_kl),
            text_sha256="d",
            **text,
        ),
        "elsewhere": Unchanged(
            n=150,
            n_everyday=50,
            unchanged=unchanged,
            everyday_unchanged=20,
            floor=100,
            everyday_in_form=in_form,
            kl_nats=kl,
            kl_ci95=(0.0, 2 * kl),
            kl_worst_nats=1.0,
            prompts_sha256="p",
            overturned=3,
        ),
        "near_misses": Leaks(
            by_kind={"unknown": KindCounts(n=n, leaks=leaks, made_up=made_up, unchanged=n // 2)},
            prompts_sha256="n",
        ),
        "generality": Generality(n=n, recited=n // 2, n_records=n, prompts_sha256="g"),
    }


def _with(name, **figures):
    audit = _audit(_verdict(name))
    return make_certificate(
        audit,
        _figures(**figures),
        key=KEY,
        device="cpu",
        prompt_format="chat",
        base_model="some/model",
        n_parameters=17,
        versions={"memlaw": "0"},
        **HASHES,
    )


def _joined(*parts):
    named = {f"shard-{n}": part for n, part in enumerate(parts, 1)}
    records = [[SimpleNamespace(sha256=str(n) * 64)] for n in range(1, len(parts) + 1)]
    whole = joined_certificate(
        {
            name: Part(part, KEY, own)
            for (name, part), own in zip(named.items(), records, strict=True)
        },
        KEY,
    )
    assert joined_mismatches(whole, named) == []
    return whole, named


WORSE = (
    {"delta": 0.012, "half": 0.001},
    {"unchanged": 59},
    {"in_form": 3},
    {"kl": 0.06},
    {"leaks": 1},
    {"made_up": 6},
)


@pytest.mark.parametrize("worse", WORSE, ids=lambda worse: next(iter(worse)))
def test_adapters_are_specific_together_if_each_of_them_is(tmp_path, worse):
    """Whatever else is better, and however much wider the other's intervals are."""
    good = _with("2", n=1000, made_up=0, half=0.1)
    whole, parts = _joined(_with("1", **worse), good)
    assert whole.specific is False
    (reason,) = whole.not_specific_because
    assert reason == f"shard-1: {parts['shard-1'].not_specific_because[0]}"
    write_json(tmp_path / "certificate.json", whole.to_json())
    read = read_certificate(tmp_path / "certificate.json")
    assert read.to_json() == json.loads(json.dumps(whole.to_json()))
    assert joined_mismatches(read, parts) == []
    for better in ({"specific": True, "not_specific_because": ()}, {"not_specific_because": ("",)}):
        (said,) = joined_mismatches(dataclasses.replace(whole, **better), parts)
        assert "verdict on specificity" in said
    assert _joined(_with("1"), good)[0].specific is True


def test_of_adapters_together_each_figure_is_the_worst_and_counts_are_summed():
    whole, parts = _joined(
        _with("1", delta=0.009, half=0.001, leaks=1), _with("2", leaks=40, kl=1.0, text_kl=1.0)
    )
    claims = whole.claims()
    assert claims["damage"]["delta_nll_nats"] == 0.009
    assert claims["damage"]["delta_nll_ci95"] == (0.008, pytest.approx(0.01))
    assert claims["damage"]["kl_nats"] == claims["elsewhere"]["kl_nats"] == 1.0
    assert (claims["near_misses"]["leaks"], claims["near_misses"]["n"]) == (41, 200)
    assert (claims["generality"]["recited"], claims["generality"]["n"]) == (100, 200)
    for name in claims:
        read = KINDS[name].read(claims[name])
        assert read.to_json() == claims[name]
    fewer = parts["shard-1"].harms["near_misses"]
    (said,) = joined_mismatches(
        dataclasses.replace(whole, harms=whole.harms | {"near_misses": fewer}), parts
    )
    assert "near_misses" in said


MUCH_WORSE = (
    {"delta": 0.014},
    {"unchanged": 56},
    {"in_form": 3},
    {"kl": 0.07},
    {"leaks": 1},
    {"made_up": 9},
)


@pytest.mark.parametrize("worse", MUCH_WORSE, ids=lambda worse: next(iter(worse)))
def test_what_is_certified_as_specific_and_is_not_does_not_hold(worse):
    then = _with("1", delta=0.009, unchanged=62, kl=0.045, made_up=4)
    assert then.specific
    again = _figures(**{"delta": 0.009, "unchanged": 62, "kl": 0.045, "made_up": 4} | worse)
    found = mismatches(then, _audit(_verdict("1")), again, key=KEY, **HASHES)
    assert any(said.startswith("certified as specific, but ") for said in found)
    assert not any("specific" in said for said in unchecked(then, again, KEY, "cpu"))
    same = _figures(delta=0.009, unchanged=62, kl=0.045, made_up=4)
    assert mismatches(then, _audit(_verdict("1")), same, key=KEY, **HASHES) == []


def test_a_divergence_that_is_not_the_certified_one_is_named():
    then, now = _with("1"), _figures()
    now["damage"] = dataclasses.replace(now["damage"], kl_nats=3.5, kl_ci95=(3.0, 4.0))
    (said,) = mismatches(then, _audit(_verdict("1")), now, key=KEY, **HASHES)
    assert said.startswith("KL on unseen text is +3.5000")


def test_harm_that_cannot_be_measured_again_is_not_taken_for_granted():
    then, now = _with("1"), _figures()
    assert unchecked(then, now, KEY, "cpu") == []
    del now["near_misses"]
    near, verdict = unchecked(then, now, KEY, "cpu")
    assert "near misses" in near
    assert "isn't here" in near
    assert "specific" in verdict
    assert len(unchecked(then, {}, None, "cpu")) == 6


def test_on_another_text_of_the_kind_intervals_must_meet():
    one = _figures(delta=0.01, half=0.004)["damage"]
    other = dataclasses.replace(
        _figures(delta=0.019, half=0.004)["damage"], text_sha256="another", kl_nats=one.kl_nats
    )
    assert one.mismatch(other) is None
    far = dataclasses.replace(other, delta_nll_nats=0.05, delta_nll_ci95=(0.046, 0.054))
    assert "ΔNLL on unseen text is +0.0100" in one.mismatch(far)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"min_p": 0.999999}, "its lowest p is 0.750, not 1.000"),
        ({"n_tokens": 500}, "3 tokens, not 500"),
    ],
)
def test_what_a_line_claims_is_compared(claim, said):
    (line,) = _certificate(_audit(_verdict("1"))).records
    forged = dataclasses.replace(
        _certificate(_audit(_verdict("1"))), records=(dataclasses.replace(line, **claim),)
    )
    (found,) = mismatches(forged, _audit(_verdict("1")), {"damage": DAMAGE}, key=KEY, **HASHES)
    assert found == f"book:1: {said}"


def test_what_else_a_certificate_claims_is_compared():
    then = _certificate(BOTH)
    assert mismatches(then, BOTH, {"damage": DAMAGE}, key=KEY, n_parameters=17, **HASHES) == []
    (said,) = mismatches(then, BOTH, {"damage": DAMAGE}, key=KEY, n_parameters=18, **HASHES)
    assert said == "the adapter has 18 trained numbers, not 17"
    more = dataclasses.replace(DAMAGE, n_tokens=10**7)
    (said,) = mismatches(then, BOTH, {"damage": more}, key=KEY, **HASHES)
    assert "measured on 10,000,000 tokens" in said
    examples = (SimpleNamespace(target_ids=(5, 2)),)
    ended = dataclasses.replace(BOTH, examples=examples)
    other = dataclasses.replace(then, end_token_id=3)
    (said,) = mismatches(other, ended, {"damage": DAMAGE}, key=KEY, **HASHES)
    assert said == "answers end with token 2, not 3"
    assert mismatches(dataclasses.replace(then, end_token_id=2), ended, {}, key=KEY, **HASHES) == []
    (said,) = unchecked(then, {"damage": DAMAGE}, KEY, "cuda")
    assert said == "what it says of cpu: this was measured on cuda"


@pytest.mark.parametrize(
    "worse", [{"delta": 0.0105}, {"unchanged": 59}, {"kl": 0.051}, {"made_up": 6}]
)
def test_a_verdict_that_turns_on_rounding_is_neither_borne_out_nor_refuted(worse):
    then = _with("1", delta=0.0095, unchanged=60, kl=0.045, made_up=4)
    again = _figures(**{"delta": 0.0095, "unchanged": 60, "kl": 0.045, "made_up": 4} | worse)
    assert then.specific
    assert mismatches(then, _audit(_verdict("1")), again, key=KEY, **HASHES) == []
    (said,) = unchecked(then, again, KEY, "cpu")
    assert said.startswith("that it is specific: ")
    assert said.endswith("by as little as rounding makes")


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"base_sha256": "f" * 64}, "shard-1: base_sha256 is another"),
        ({"dtype": "bfloat16"}, "shard-1: dtype is another"),
        ({"threshold": 0.9}, "shard-1: threshold is another"),
        ({"certified": False}, "contradicts itself"),
        ({"records_sha256": "0" * 64}, "records' hash"),
    ],
)
def test_what_a_certificate_over_adapters_forges_is_found(claim, said):
    whole, parts = _joined(_with("1"), _with("2"))
    found = joined_mismatches(dataclasses.replace(whole, **claim), parts)
    assert any(said in line for line in found), found


def test_lines_over_adapters_are_those_of_the_adapters():
    whole, parts = _joined(_with("1"), _with("2"))
    lines = tuple(dataclasses.replace(line, min_p=1.0) for line in whole.records)
    (said,) = joined_mismatches(dataclasses.replace(whole, records=lines), parts)
    assert said == "its lines are not those of the adapters' certificates"


def test_a_certificate_over_adapters_of_an_earlier_version_is_told_as_such():
    whole, parts = _joined(_with("1", leaks=1), _with("2", leaks=40))
    before = dataclasses.replace(whole, harms=whole.harms | parts["shard-1"].harms)
    found = joined_mismatches(before, parts)
    assert found
    assert all("as earlier versions had it" in said for said in found)


def test_adapters_may_have_been_measured_on_other_devices_and_with_other_clocks():
    other = dataclasses.replace(
        _with("2"), device="cuda", clock="2026-01-01", prompt_rendering="generation"
    )
    whole, _ = _joined(_with("1"), other)
    assert whole.device == "cpu"


@pytest.mark.parametrize(
    ("records", "mismatches", "unchecked", "said"),
    [
        (BOTH, (), (), "THE CERTIFICATE HOLDS"),
        (BOTH, ("one",), ("two",), "THE CERTIFICATE DOES NOT HOLD: 1 mismatch(es)"),
        (BOTH, (), ("two",), "NOTHING SPEAKS AGAINST .* CAN BE CHECKED HERE$"),
        (None, (), ("two",), "NOTHING SPEAKS AGAINST .*; AND ONLY 1 OF 2 RECORDS ARE CERTIFIED"),
        (None, (), (), "THE CERTIFICATE IS TRUE, BUT ONLY 1 OF 2 RECORDS ARE CERTIFIED"),
    ],
)
def test_the_verdict_says_what_was_checked(records, mismatches, unchecked, said):
    audit = records or _audit(_verdict("1"), _verdict("2", **FAILED))
    check = CertificateCheck(
        certificate=_certificate(audit),
        audit=audit,
        harms={},
        mismatches=mismatches,
        unchecked=unchecked,
    )
    assert re.match(said.replace("(es)", r"\(es\)"), certificate_verdict(check))
