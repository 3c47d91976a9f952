"""What a folder remembers: for its owner alone, and enough to go on from."""

import json
import stat

import pytest
import torch

import memlaw
from memlaw.core.commitment import commitment, read_key
from memlaw.data.record import Record
from memlaw.writer.private import read_learner, read_private_records, write_private


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    settings = {"specificity": False, "retention": 0, "max_epochs": 300, **texts}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    return out


def test_the_records_are_kept_as_they_were_given(written, phone_book):
    kept = read_private_records(written)
    assert [(r.prompt, r.completion) for r in kept] == phone_book
    lines = json.loads((written / "certificate.json").read_text())["records"]
    key = read_key(written)
    assert [(r.id, commitment(key, r.sha256)) for r in kept] == [
        (line["id"], line["commitment"]) for line in lines
    ]


def test_only_the_owner_can_read_what_is_private(written):
    for path in (written / "private").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((written / "private").stat().st_mode) == 0o700


def test_no_file_that_is_shared_gains_text_of_the_records(written, phone_book):
    for name in ("certificate.json", "run.json", "README.md", ".gitignore"):
        text = (written / name).read_text(encoding="utf-8")
        assert not any(completion in text for _, completion in phone_book), name
    assert "private/\n" in (written / ".gitignore").read_text()
    assert "never upload" in (written / "README.md").read_text()


def test_the_first_generation_is_on_record(written, phone_book):
    run = json.loads((written / "run.json").read_text())
    (first,) = run["generations"]
    n = len(phone_book)
    assert (first["number"], first["records"], first["added"], first["n_certified"]) == (1, n, n, n)
    assert first["rank"] == run["adapter"]["rank"]
    assert first["damage_nats"] == run["results"]["damage"]["delta_nll_nats"]


def test_the_optimisers_memory_is_kept(written):
    tensors, values = read_learner(written)
    rank = json.loads((written / "run.json").read_text())["adapter"]["rank"]
    assert tensors["exp_avg.0"].shape == (128, rank)
    assert float(tensors["exp_avg_sq.1"].sum()) > 0
    assert values == {"gate": None, "push": None, "still": 0}


def test_chats_and_line_breaks_come_back(tmp_path):
    prompt = ({"role": "system", "content": "Be brief.\u2028"}, {"role": "user", "content": "A?\n"})
    records = [Record(prompt=prompt, completion="x\x85y\n", id="a:1")]
    write_private(tmp_path, records, {}, {})
    (kept,) = read_private_records(tmp_path)
    assert (kept, kept.sha256) == (records[0], records[0].sha256)


def test_a_damaged_file_says_what_to_do(tmp_path):
    write_private(tmp_path, [Record(prompt="a", completion="b", id="c")], {}, {})
    (tmp_path / "private" / "records.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(memlaw.MemlawError, match=r"damaged.*Remove it"):
        read_private_records(tmp_path)
    (tmp_path / "private" / "learner.safetensors").write_bytes(b"x")
    assert read_learner(tmp_path) is None


def test_what_a_killed_process_was_writing_goes(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / ".records.jsonl.x1y2").write_text("half")
    write_private(tmp_path, [], {}, {})
    assert {p.name for p in (tmp_path / "private").iterdir()} == {
        "records.jsonl",
        "learner.safetensors",
    }


@pytest.mark.parametrize(
    "values",
    [
        *([], "x", None, {"gate": "2"}, {"gate": -1}, {"gate": True}, {"push": "x"}, {"push": 0.0}),
        *({"push": float("nan")}, {"push": float("inf")}, {"push": [1.0]}),
    ],
)
def test_of_a_learner_that_says_something_else_nothing_is_taken(tmp_path, values):
    write_private(tmp_path, [], {"a": torch.ones(2)}, values)
    assert read_learner(tmp_path) is None


def test_what_a_learner_says_is_read_back(tmp_path):
    write_private(tmp_path, [], {"a": torch.ones(2)}, {"gate": 9, "push": 2.56})
    tensors, values = read_learner(tmp_path)
    assert (tensors["a"].tolist(), values) == ([1.0, 1.0], {"gate": 9, "push": 2.56})
