"""A new kind of harm is one class and one line: everything else takes it from there."""

import dataclasses
import json
import math

import pytest

import memlaw
from memlaw.cli import run
from memlaw.measure.harm import KINDS, Harm, Measurement

SETTINGS = {"objective": "sft", "retention": 3.0, "max_epochs": 300}


@dataclasses.dataclass(frozen=True)
class Loudness:
    """A made-up kind: how loud the adapted model is."""

    decibels: float
    unit = "dB"

    @property
    def high(self):
        return self.decibels

    def to_json(self):
        return {"decibels": self.decibels}

    def joined(self, harms):
        return Loudness(max(h.decibels for h in harms))

    def row(self):
        return "loudness", f"{self.decibels:g} dB"

    def row_beside(self, claimed):
        return "loudness", f"{self.decibels:g} dB (certificate: {claimed.decibels:g})"

    def too_high(self):
        return f"loudness may be {self.decibels:g}"

    def paragraph(self):
        return f"It is as loud as **{self.decibels:g} dB**."

    def mismatch(self, claimed):
        if self.decibels == claimed.decibels:
            return None
        return f"loudness is {self.decibels:g}, not {claimed.decibels:g}"


class Microphone:
    """Measures it; what it hears is the test's to say."""

    name, bound, hears = "loudness", "max_damage", 0.1

    @classmethod
    def of_run(cls, subject):
        return cls()

    @classmethod
    def of_claim(cls, subject, claim):
        return cls()

    @staticmethod
    def limit(setting):
        return setting

    @staticmethod
    def read(claim):
        return Loudness(**claim)

    def measure(self, model, adapted):
        with adapted() as changed:
            assert changed is not None
        return Loudness(self.hears)

    def details(self, harm, tokenizer):
        return {"loudness_by_hour": [harm.decibels] * 24}

    def answers(self, harm):
        return ()


@pytest.fixture
def microphone(monkeypatch):
    monkeypatch.setitem(KINDS, "loudness", Microphone)
    return lambda heard: monkeypatch.setattr(Microphone, "hears", heard)


def test_the_kinds_that_are_there_keep_the_protocol():
    for name, kind in KINDS.items():
        assert kind.name == name
        assert not kind.bound or hasattr(memlaw.WriteConfig(), kind.bound)
        for method in ("of_run", "of_claim", "limit", "read", "measure", "details", "answers"):
            assert callable(getattr(kind, method))
    assert isinstance(Loudness(1.0), Harm)
    assert isinstance(Microphone(), Measurement)


@pytest.mark.slow
def test_it_is_measured_certified_shown_and_measured_again(
    llama, phone_book, phone_file, texts, tmp_path, microphone, capsys, monkeypatch
):
    monkeypatch.setattr(memlaw.WriteConfig, "holds", False)  # measured, but not trained for
    out = tmp_path / "out"
    result = memlaw.write(phone_book, out, model=str(llama), **texts, **SETTINGS)
    assert result.certified
    assert result.within_bounds is None
    assert result.harms["loudness"] == Loudness(0.1)
    assert result.damage == result.harms["damage"]
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["harms"]["loudness"] == {"decibels": 0.1}
    results = json.loads((out / "run.json").read_text())["results"]
    assert results["loudness"] == {"decibels": 0.1}
    assert results["loudness_by_hour"] == [0.1] * 24
    assert "as loud as **0.1 dB**" in (out / "README.md").read_text()
    args = ["audit", str(phone_file), "--certificate", str(out / "certificate.json")]
    assert run([*args, "--model", str(llama)]) == 0
    assert "0.1 dB (certificate: 0.1)" in capsys.readouterr().out
    microphone(0.7)
    check = memlaw.check_certificate(out / "certificate.json", phone_book, model=str(llama))
    assert check.mismatches == ("loudness is 0.7, not 0.1",)
    assert run(["report", str(out), "-o", str(tmp_path / "tables"), "--format", "md"]) == 0
    (table,) = (tmp_path / "tables").glob("*loudness.md")
    assert "| decibels | 0.1 |" in table.read_text()
    assert run(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert "Harm: loudness" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_bound_on_it_is_kept_or_said_to_be_missed(
    llama, phone_file, texts, tmp_path, microphone, capsys
):
    microphone(5.0)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (SETTINGS | texts).items()]
    args = ["write", str(phone_file), "-o", str(tmp_path / "out"), "--model", str(llama), *flags]
    assert run([*args, "--max-epochs=150", "--max-damage=3"]) == 1
    said = capsys.readouterr()
    assert "BUT NOT HARMLESS: loudness may be 5 dB, above --max-damage 3" in said.out
    assert "Certified, but loudness may be 5: retention goes up." in said.err


@pytest.mark.slow
def test_what_is_no_number_is_not_below_a_bound(llama, phone_book, texts, tmp_path, microphone):
    microphone(math.nan)
    settings = SETTINGS | texts | {"max_epochs": 30, "max_damage": 3.0}
    with pytest.raises(ValueError, match="not JSON compliant"):
        memlaw.write(phone_book, tmp_path / "out", model=str(llama), **settings)
    assert (tmp_path / "out" / "checkpoint.safetensors").is_file()  # what was trained isn't lost
    assert not (tmp_path / "out" / "certificate.json").exists()
