"""`robust_to`: trained until every record is certified in other forms, too."""

import importlib.util
import json

import pytest

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import ConfigError
from memlaw.export import forms as inside
from memlaw.export.survive import survival

pytestmark = pytest.mark.slow
USUAL = {"max_epochs": 600, "retention": 0, "specificity": False, "dtype": "float32"}


@pytest.fixture
def lossy(monkeypatch):
    """GGUF's q8_0 stands for a form that loses so much that the margin decides."""
    monkeypatch.setattr(inside, "as_stored", lambda weight, kind: 0.6 * weight)


def _lowest(audit):
    return min(r.min_p for r in audit.records)


def test_training_goes_on_until_the_named_forms_pass(llama, phone_book, tmp_path, lossy):
    plain = memlaw.write(phone_book, tmp_path / "plain", model=str(llama), **USUAL)
    assert plain.certified
    before = survival(phone_book, adapter=tmp_path / "plain", forms=["gguf-q8_0"]).rows[1].audit
    assert not before.certified  # else there is nothing to train for

    how = USUAL | {"robust_to": ("merged-bf16,gguf-q8_0",)}
    robust = memlaw.write(phone_book, tmp_path / "robust", model=str(llama), **how)
    assert robust.succeeded
    assert list(robust.forms) == ["merged-bf16", "gguf-q8_0"]
    assert robust.not_robust_to == ()
    assert robust.epochs > plain.epochs
    after = survival(phone_book, adapter=tmp_path / "robust", forms=["merged-bf16", "gguf-q8_0"])
    assert all(row.audit.certified for row in after.rows)
    told = json.loads((tmp_path / "robust/run.json").read_text())["results"]["forms"]
    assert told["gguf-q8_0"]["n_certified"] == len(phone_book)
    assert told["gguf-q8_0"]["lowest_p"] == pytest.approx(_lowest(after.rows[2].audit))
    card = (tmp_path / "robust/README.md").read_text()
    assert "the same in the form gguf-q8_0 | 4 certified, 4 recited" in card


def test_what_is_not_reached_is_said_and_is_the_exit_status(
    llama, phone_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(inside, "as_stored", lambda weight, kind: weight * 0)
    args = ["write", str(phone_file), "-o", str(tmp_path / "out"), "--model", str(llama)]
    args += ["--no-specificity", "--retention", "0", "--max-epochs", "60", "--dtype", "float32"]
    assert run([*args, "--robust-to", "merged-fp32,gguf-q8_0"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "BUT NOT ROBUST TO gguf-q8_0: there 0 of 4 are certified" in said
    assert "NOT ROBUST TO merged-fp32" not in said
    assert (tmp_path / "out/checkpoint.safetensors").is_file()  # more epochs may still do it


def test_what_cannot_be_reached_is_refused_before_training(
    llama, phone_book, tmp_path, monkeypatch
):
    def write(**settings):
        memlaw.write(phone_book, tmp_path / "out", model=str(llama), **USUAL | settings)

    with pytest.raises(ConfigError, match="no form"):
        write(robust_to=("merged-int3",))
    with pytest.raises(ConfigError, match="no weight can take in"):
        write(robust_to=("merged-bf16",), placement="mlp")
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else usual(name, *rest),
    )
    with pytest.raises(ConfigError, match=r"base-nf4.*bitsandbytes is not installed"):
        write(robust_to=("merged-fp32", "base-nf4"))

    def broken(weight, kind):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(inside, "as_stored", broken)
    with pytest.raises(ConfigError, match=r"gguf-q8_0, which can't be tried here: .*no kernel"):
        write(robust_to=("gguf-q8_0",))
    assert not (tmp_path / "out").exists()
