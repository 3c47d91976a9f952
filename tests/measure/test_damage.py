"""Harm to the base model: measured, and bounded where that is asked for."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw.data.texts import retained_text, unseen_text
from memlaw.measure import unseen_text as writer
from memlaw.measure.damage import Damage, measure_damage, windows
from memlaw.model.formats import loaded_adapter


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Some text that isn't the default."""
    path = tmp_path_factory.mktemp("text") / "retain.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}." for n in range(4000)), encoding="utf-8")
    return path


def test_the_text_to_measure_on_is_not_the_text_to_hold_on_to():
    seen, unseen = set(retained_text().split("\n\n")), set(unseen_text()[0].split("\n\n"))
    assert len(seen) > 1000
    assert len(unseen) > 1000
    assert not seen & unseen


@pytest.mark.slow
def test_damage_is_what_cross_entropy_says(llama, phone_book, tmp_path):
    settings = {"model": str(llama), "max_epochs": 3, "retention": 0, "specificity": False}
    result = memlaw.write(phone_book, tmp_path / "out", **settings)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text, name = unseen_text()
    ids = windows(tokenizer, text, context=512)
    found = measure_damage(
        model, lambda: loaded_adapter(result.out, model), ids, text_name=name, text=text
    )

    def per_window(model):
        with torch.no_grad():
            log_p = model(ids).logits[:, :-1].log_softmax(-1)
        return log_p, -log_p.gather(2, ids[:, 1:, None])[:, :, 0].mean(1).double()

    before, nll_before = per_window(model)
    with loaded_adapter(result.out, model) as adapted:
        after, nll_after = per_window(adapted)
    delta = nll_after - nll_before
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert found.delta_nll_nats == pytest.approx(float(delta.mean()), abs=1e-5)
    assert found.kl_nats == pytest.approx(float(kl), abs=1e-5)
    assert found.kl_nats > 1e-4
    half = 2.0395 * float(delta.std()) / math.sqrt(32)  # Student's t, 31 degrees of freedom
    low, high = found.delta_nll_ci95
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert result.damage.delta_nll_nats == pytest.approx(found.delta_nll_nats, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("little_is_held")
def test_a_retained_text_changes_what_is_held_on_to(llama, phone_book, text_file, tmp_path):
    weights = []
    for name, retain in (("usual", None), ("mine", str(text_file))):
        out = tmp_path / name
        memlaw.write(phone_book, out, model=str(llama), max_epochs=2, retain=retain)
        weights.append(load_file(out / "adapter_model.safetensors"))
        assert json.loads((out / "run.json").read_text())["config"]["retain"] == retain
    assert any(not torch.allclose(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_retained_text_that_is_too_short_is_refused(llama, phone_book, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    with pytest.raises(memlaw.MemlawError, match=r"the text to retain is too short: it needs"):
        memlaw.write(phone_book, tmp_path / "out", model=str(llama), retain=str(short))
    assert not (tmp_path / "out").exists()


SETTINGS = {"objective": "sft", "retention": 3.0, "max_epochs": 300, "specificity": False}


def _scripted(monkeypatch, highs):
    """Damage as if measured, with these upper ends; the last one from then on."""
    looks = []
    usual = writer.measure_damage

    def measured(*args, **kwargs):
        found = usual(*args, **kwargs)
        high = highs[min(len(looks), len(highs) - 1)]
        looks.append(high)
        return dataclasses.replace(
            found, delta_nll_nats=high - 0.01, delta_nll_ci95=(high - 0.02, high)
        )

    monkeypatch.setattr(writer, "measure_damage", measured)
    return looks


class _Notes(memlaw.Observer):
    def __init__(self):
        self.said = []

    def notice(self, text):
        self.said.append(text)


@pytest.mark.slow
def test_training_goes_on_until_the_bound_holds(llama, phone_book, tmp_path, monkeypatch):
    looks, notes = _scripted(monkeypatch, [0.5, 0.2, 0.09]), _Notes()
    result = memlaw.write(
        phone_book, tmp_path / "out", model=str(llama), max_damage=0.1, observer=notes, **SETTINGS
    )
    assert looks == [0.5, 0.2, 0.09]
    assert result.certified
    assert result.harmless
    assert result.stopped_because == "certified, and below max_damage"
    assert result.damage.delta_nll_ci95[1] == 0.09
    assert [note for note in notes.said if "retention goes up" in note] == [
        "Certified, but ΔNLL may be +0.5000: retention goes up.",
        "Certified, but ΔNLL may be +0.2000: retention goes up.",
    ]
    used = [e["retention"] for e in json.loads((result.out / "run.json").read_text())["curve"]]
    assert max(used) > used[0] == 3.0
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_at_the_last_epoch_the_lesser_damage_is_kept(llama, phone_book, tmp_path, monkeypatch):
    first = memlaw.write(phone_book, tmp_path / "first", model=str(llama), **SETTINGS)
    _scripted(monkeypatch, [0.2, 0.3])
    settings = SETTINGS | {"max_epochs": first.epochs + 1, "max_damage": 0.1}
    result = memlaw.write(phone_book, tmp_path / "out", model=str(llama), **settings)
    assert result.certified
    assert not result.harmless
    assert result.damage.delta_nll_ci95[1] == 0.2
    assert result.epochs == first.epochs


@pytest.mark.slow
def test_a_bound_out_of_reach_ends_with_the_best_that_was_certified(
    llama, phone_file, tmp_path, monkeypatch, capsys
):
    from memlaw.cli.dispatch import run

    _scripted(monkeypatch, [0.5, 0.2, 0.3])
    out = tmp_path / "out"
    flags = ["--model", llama, "--max-damage", 0.1, "--retention", 3.0, "--max-epochs", 300]
    flags.append("--no-specificity")
    status = run([str(x) for x in ("write", phone_file, "-o", out, *flags)])
    said = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert "CERTIFIED BUT NOT HARMLESS: ΔNLL may be +0.2000 nats per token, above" in said
    assert "above --max-damage 0.1 " in said
    assert "NOT CERTIFIED" not in said
    result = json.loads((out / "run.json").read_text())
    assert result["status"] == "certified"
    assert result["harmless"] is False
    assert result["results"]["damage"]["delta_nll_ci95"][1] == 0.2
    assert result["epochs"] == len(result["curve"]) < 200
    assert (out / "checkpoint.safetensors").exists()  # a laxer bound can go on from here
    check = memlaw.check_certificate(out / "certificate.json", phone_file)
    assert check.audit.certified
    assert all("ΔNLL" in line for line in check.mismatches)  # the script's, not the model's
    assert check.mismatches
    status = run(
        [str(x) for x in ("write", phone_file, "-o", out, *flags, "--resume", "--max-damage", 0.5)]
    )
    assert status == 0


@pytest.mark.slow
def test_a_real_bound_is_kept_on_the_real_measurement(llama, phone_book, tmp_path):
    loose = memlaw.write(phone_book, tmp_path / "loose", model=str(llama), **SETTINGS)
    bound = 0.7 * loose.damage.delta_nll_ci95[1]
    assert bound > 0
    tight = memlaw.write(
        phone_book, tmp_path / "tight", model=str(llama), max_damage=bound, **SETTINGS
    )
    assert loose.certified
    assert tight.certified
    assert tight.harmless
    assert tight.damage.delta_nll_ci95[1] <= bound
    assert tight.epochs > loose.epochs
    assert isinstance(tight.damage, Damage)


# ---------------------------------------------------------------- a certificate's damage


@pytest.fixture(scope="module")
def written(llama, phone_book, text_file, tmp_path_factory):
    """A certified folder whose damage was measured on a user's file."""
    text = tmp_path_factory.mktemp("unseen") / "unseen.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    out = tmp_path_factory.mktemp("written") / "out"
    settings = {"retention": 0, "max_epochs": 300, "damage_text": str(text), "specificity": False}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    return out, text


@pytest.mark.slow
def test_a_certificates_damage_is_measured_again(written, phone_book):
    out, _ = written
    check = memlaw.check_certificate(out / "certificate.json", phone_book)
    assert check.holds
    assert check.damage.delta_nll_nats == pytest.approx(
        check.certificate.damage["delta_nll_nats"], abs=1e-3
    )


def test_a_certificate_that_makes_light_of_the_damage_does_not_hold(written, phone_book):
    out, _ = written
    path = out / "certificate.json"
    honest = path.read_text(encoding="utf-8")
    content = json.loads(honest)
    content["damage"] |= {"delta_nll_nats": -1.0, "delta_nll_ci95": [-1.0, 5.0]}
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        check = memlaw.check_certificate(path, phone_book)
        assert not check.holds
        assert len(check.mismatches) == 1
        assert check.mismatches[0].startswith("ΔNLL on unseen text is ")
        assert check.mismatches[0].endswith("not -1.0000 (-1.0000 to +5.0000)")
        content["damage"]["delta_nll_ci95"] = "none"
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(memlaw.MemlawError, match="not a certificate"):
            memlaw.check_certificate(path, phone_book)
    finally:
        path.write_text(honest, encoding="utf-8")


def test_without_its_text_the_damage_is_left_unmeasured_and_said_to_be(written, phone_file, capsys):
    from memlaw.cli.dispatch import run

    out, text = written
    away = text.rename(text.with_suffix(".away"))
    try:
        arguments = ["audit", phone_file, "--certificate", out / "certificate.json"]
        assert run([str(x) for x in arguments]) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "not measured again: the certificate's text isn't here" in said
        assert "NOTHING SPEAKS AGAINST THE CERTIFICATE, BUT NOT ALL OF IT CAN BE CHECKED" in said
    finally:
        away.rename(text)
