"""Files are whole or not there, and hashes don't depend on what doesn't matter."""

import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open

from memlaw.core.errors import OutputError
from memlaw.core.files import (
    atomic_path,
    file_sha256,
    json_sha256,
    write_json,
    write_tensors,
    write_text,
)


class Failure(Exception):
    """Something that goes wrong while writing."""


@pytest.mark.parametrize("before", [None, b"as it was"])
def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)

    def write():
        with atomic_path(path) as work:
            assert work.parent == tmp_path
            work.write_bytes(b"half of it")
            raise Failure

    with pytest.raises(Failure):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_path(path) as work:
        work.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_gets_the_usual_permissions(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"no: can't write there"):
        write_text(tmp_path / "no" / "a.txt", "x")


def test_a_folder_in_the_way_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match=r"a\.txt: can't be written"):
        write_text(tmp_path / "a.txt", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_text_is_utf_8_with_plain_line_ends(tmp_path):
    write_text(tmp_path / "a.txt", "Zoë\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"Zo\xc3\xab\r\n\n"


def test_json_is_readable_and_ends_in_a_line_break(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1.5, None]}
    assert "é" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_json(tmp_path, value):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [value])
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1], dtype=torch.int8)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
        back = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


def test_a_files_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_values_hash_depends_on_content_not_on_key_order():
    one = json_sha256({"a": 1, "b": [1, 2]})
    assert one == json_sha256({"b": [1, 2], "a": 1})
    assert one != json_sha256({"a": 1, "b": [2, 1]})
    assert len({json_sha256(v) for v in (1, "1", 1.5, None, [1], {"1": 1})}) == 6
