"""The adapter that a trainer left behind is found, and which one was taken is said."""

import shutil
from pathlib import Path

import pytest

import memlaw
from memlaw.core.observer import Observer
from memlaw.model.formats import found_adapter


def _adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_folder_that_is_an_adapter_is_taken_as_it_is(tmp_path):
    folder = _adapter(tmp_path / "out")
    _adapter(folder / "checkpoint-9")
    assert found_adapter(folder) == (folder, "")


@pytest.mark.parametrize("inner", ["", "adapter", "default"])
def test_of_checkpoints_the_last_by_its_number_is_taken(tmp_path, inner):
    for n in (5, 100, 20):
        _adapter(tmp_path / f"checkpoint-{n}" / inner)
    (tmp_path / "checkpoint-300").mkdir()  # still being written
    (tmp_path / "runs").mkdir()
    found, said = found_adapter(tmp_path)
    assert found == tmp_path / "checkpoint-100" / inner
    assert said.endswith(f"{found} is taken, the last of 3 checkpoints.")


def test_the_only_adapter_in_a_subfolder_is_taken(tmp_path):
    only = _adapter(tmp_path / "lora_model")
    found, said = found_adapter(tmp_path)
    assert found == only
    assert "the only one in it" in said


def test_of_several_none_is_guessed(tmp_path):
    _adapter(tmp_path / "a")
    _adapter(tmp_path / "b")
    assert found_adapter(tmp_path) == (tmp_path, "")
    assert found_adapter(tmp_path / "nowhere") == (tmp_path / "nowhere", "")


def test_an_audit_says_which_adapter_it_took(tmp_path, llama, phone_book):
    finished = Path(__file__).parents[1] / "recorded/folders/finished"
    names = ("adapter_config.json", "adapter_model.safetensors")
    (tmp_path / "checkpoint-40").mkdir()
    for name in names:
        shutil.copy(finished / name, tmp_path / "checkpoint-40" / name)
    said = []

    class Heard(Observer):
        def notice(self, text):
            said.append(text)

    model = str(Path(__file__).parents[1] / "recorded/model")
    memlaw.audit(phone_book, adapter=tmp_path, model=model, decode="none", observer=Heard())
    assert any("checkpoint-40 is taken" in line for line in said)
