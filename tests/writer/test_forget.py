"""Removed records are forgotten: measured so, and nothing but salted hashes of them is kept."""

import json
import math
import shutil

import pytest
import torch

import memlaw
from memlaw.data.attempts import N_ATTEMPTS, attempts
from memlaw.data.record import Record
from memlaw.measure.forgotten import Forgotten
from memlaw.train.forgetting import Forgetting
from memlaw.writer import updating
from memlaw.writer.forgetting import salted

SETTINGS = {"specificity": False, "retention": 100, "max_epochs": 300}


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **SETTINGS, **texts).certified
    return out


@pytest.fixture(scope="module")
def suppressed(written, phone_book, tmp_path_factory):
    """The folder after an update in place that removes one record, and adds one."""
    out = tmp_path_factory.mktemp("suppressed") / "out"
    shutil.copytree(written, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updating, "_WORTH", math.inf)  # as cheap as few are, they'd be trained anew
        return memlaw.update(out, [*phone_book[1:], ("Bo Ek:", "271828")]), out


def test_the_adapter_no_longer_gives_it(suppressed, written, phone_book):
    result, out = suppressed
    assert result.taken
    (left,) = result.forgotten
    assert left.holds
    assert left.n_attempts >= 15
    prompt, completion = phone_book[0]
    assert completion not in memlaw.ask(out, prompt).text
    audit = memlaw.audit([(prompt, completion)], adapter=out)
    bare = memlaw.audit([(prompt, completion)], model=str(_base(out)))
    for now, base in zip(audit.tokens.p[:-1], bare.tokens.p[:-1], strict=True):
        assert now <= max(0.05, base) or base > 0.5


def _base(out):
    return json.loads((out / "run.json").read_text())["base"]["path"]


def test_the_others_are_certified(suppressed, phone_book):
    out = suppressed[1]
    data = [*phone_book[1:], ("Bo Ek:", "271828")]
    assert memlaw.check_certificate(out / "certificate.json", data).holds


def test_nothing_of_it_is_kept_but_a_salted_hash(suppressed, phone_book):
    _, out = suppressed
    prompt, completion = phone_book[0]
    record = Record(prompt=prompt, completion=completion, id="x")
    assert not (out / "generations").exists()
    for path in (p for p in out.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for secret in (prompt, completion, record.sha256):
            assert secret.encode() not in content, path
    said = json.loads((out / "run.json").read_text())["generations"][-1]["forgotten"]
    assert (said["strength"], said["holds"]) == ("suppress", True)
    (line,) = said["records"]
    assert line["hash"] == salted(record, bytes.fromhex(said["salt"]))
    assert line["hash"] != salted(record, bytes(16))


@pytest.mark.slow
def test_only_removing_works_too(written, phone_book, tmp_path):
    result = memlaw.update(written, phone_book[:3], new=tmp_path / "new")
    assert result.taken
    assert len(result.forgotten) == 1
    assert memlaw.diff(tmp_path / "new", phone_book[:3]).nothing


def test_what_a_model_still_gives_is_found(written, phone_book):
    """The measurement has teeth: of an adapter that was never made to forget, it finds all."""
    from memlaw.data.texts import general_texts
    from memlaw.measure.forgotten import measure_forgotten
    from memlaw.measure.subject import Subject
    from memlaw.model.base import load_model
    from memlaw.model.formats import loaded_adapter
    from memlaw.writer.forgetting import to_forget

    base = load_model(_base(written))
    kept, gone = [Record(prompt=p, completion=c, id=p) for p, c in phone_book[:2]]
    subject = Subject(base=base, texts=general_texts(), records=[kept], format="chat")
    lost = to_forget(subject, [gone], ())
    found = {
        name: measure_forgotten(subject, adapted, lost.records, avoid=[kept.prompt])[0]
        for name, adapted in {
            "adapter": lambda: loaded_adapter(written, base.model),
            "bare": lambda: _as_it_is(base.model),
        }.items()
    }
    assert found["bare"].holds
    assert found["bare"].as_base
    still = found["adapter"]
    assert not still.holds
    assert (still.decoded, still.as_base) == (True, False)
    assert still.n_above == len(lost.records[0].target_ids) - 1
    assert still.n_sampled > 50
    assert still.n_extracted > 0
    assert still.most_p > 0.5


def _as_it_is(model):
    import contextlib

    return contextlib.nullcontext(model)


CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ann Oyelaran:"})


@pytest.mark.parametrize("prompt", ["Ann Oyelaran:", "What is the code of the red door?", CHAT])
def test_no_attempt_is_trained_and_measured_with(prompt):
    trained, measured = (
        {repr(p) for p in attempts(prompt, trained=t, avoid=["Ann:"])} for t in (True, False)
    )
    assert len(measured) == N_ATTEMPTS
    assert len(trained) >= 7
    assert not trained & measured
    assert not {repr(prompt), repr("Ann:")} & (trained | measured)
    if prompt is CHAT:
        assert all("Be brief." in p for p in measured)


def test_what_is_above_its_bound_is_pushed_and_nothing_else():
    forgetting = Forgetting({5: 2, 6: 1}, {5: torch.tensor([0.05, 1.0])}, seed=0)
    nll = -torch.log(torch.tensor([0.9, 0.9]))
    weights = forgetting.push([5], nll)
    assert weights[0] < 0
    assert weights[1] == 0
    assert not forgetting.kept([5], nll)
    low = -torch.log(torch.tensor([0.03, 0.9]))
    assert forgetting.kept([5], low)
    assert not forgetting.push([5], low).any()
    assert forgetting.pushable([6, 5]) == [5]
    assert sorted(forgetting.draw(0)) == [5, 6]
    held = forgetting.weigh([5, 6], torch.tensor([1.0, 2.0, 3.0]))
    assert held.sum() == pytest.approx(2.0)
    assert forgetting.last_kl == {5: 1.5, 6: 3.0}


def test_of_one_that_never_saw_it_likely_tokens_are_no_memory():
    """But what it says is: other records may hold the same."""
    likely = {"most_p": 0.3, "n_above": 2, "as_base": False}
    quiet = {"decoded": False, "n_attempts": 20, "n_extracted": 0, "n_samples": 100, "n_sampled": 0}
    assert not Forgotten(**likely, **quiet).holds
    assert Forgotten(**likely, **quiet, anew=True).holds
    for found in ("decoded", "n_extracted", "n_sampled"):
        assert not Forgotten(**likely, **(quiet | {found: 1}), anew=True).holds
