"""Two writers of one folder, a folder that goes in the middle, a run killed as it hands over."""

import os
import shutil

import pytest

import memlaw
from memlaw.core.errors import OutputError
from memlaw.core.locks import locked

SETTINGS = {"specificity": False, "retention": 0, "max_epochs": 300}


class Looks(memlaw.Observer):
    """Calls something after the first epoch."""

    def __init__(self, call):
        self.call = call

    def epoch(self, stats, n_records, max_epochs):
        if self.call is not None:
            call, self.call = self.call, None
            call()


@pytest.fixture
def write(llama, phone_book, texts):
    return lambda out, **more: memlaw.write(
        phone_book, out, model=str(llama), **SETTINGS, **texts, **more
    )


def _files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_one_ends(write, tmp_path, phone_book):
    out, refused = tmp_path / "out", []

    def second():
        for call in (lambda: write(out), lambda: write(out, resume=True)):
            with pytest.raises(OutputError, match=f"process {os.getpid()} on host") as error:
                call()
            refused.append(error.value)

    assert write(out, observer=Looks(second)).certified
    assert len(refused) == 2
    assert not (out / ".lock").exists()
    other = tmp_path / "other"
    with locked(other, make=True), pytest.raises(OutputError, match="another process"):
        memlaw.write_shards(phone_book, other, shards=2)


@pytest.mark.slow
def test_a_folder_that_goes_in_the_middle_comes_again_with_what_was_trained(write, tmp_path):
    out = tmp_path / "out"
    once = write(tmp_path / "once")
    again = write(out, observer=Looks(lambda: shutil.rmtree(out)))
    assert again.certified
    assert again.epochs == once.epochs
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("after", ["save_adapter", "write_private", "write_json"])
def test_killed_while_it_is_handed_over_it_goes_on_to_the_same_bytes(
    write, tmp_path, monkeypatch, after
):
    """Too short for a checkpoint of its own, it had nothing to go on from."""
    from memlaw.writer import handover

    write(tmp_path / "once")
    out, usual = tmp_path / "out", getattr(handover, after)

    def killed(*args, **more):
        usual(*args, **more)
        os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(handover, after, killed)
            write(out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (out / "certificate.json").exists()
    with pytest.raises(OutputError, match="go on with it by --resume"):
        write(out)
    assert write(out, resume=True).certified
    for name in ("adapter_model.safetensors", "tokens.parquet", "private/records.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
    assert _files(out).keys() == _files(tmp_path / "once").keys()
