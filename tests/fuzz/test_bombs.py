"""Small files that become large, and large ones: refused within bounds, or read in little time."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memlaw.core.errors import DataError
from memlaw.data import content, readers
from memlaw.data.reading import read_records

BOUND = 2**20
ROW = {"prompt": "p", "completion": "c"}


@pytest.fixture
def bounded(monkeypatch):
    monkeypatch.setattr(content, "MOST_BYTES", BOUND)
    monkeypatch.setattr(readers, "MOST_BYTES", BOUND)


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_what_unpacks_to_more_than_is_read_at_once_is_refused(bounded, tmp_path, packing):
    path, n = tmp_path / "bomb.jsonl", 64 * BOUND
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), packing) as file:
        for _ in range(n // BOUND):
            file.write(b" " * BOUND)
    assert path.stat().st_size < BOUND / 4
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with pytest.raises(DataError, match="Split it into several files"):
        read_records(path)
    assert pool.bytes_allocated() - before < 4 * BOUND


def test_a_parquet_file_that_holds_one_cell_a_million_times_is_refused(bounded, tmp_path):
    """Its pages are a few kilobytes; in memory it would be gigabytes."""
    n = 100_000
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), ["x" * 50_000])
    table = pa.table({"prompt": ["p"] * n, "completion": cell})
    pq.write_table(table, tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < BOUND
    peak = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match="Split it into several files"):
        read_records(tmp_path / "bomb.parquet")
    assert pa.default_memory_pool().max_memory() - peak < 64 * BOUND


def test_a_damaged_batch_is_not_even_asked_for_its_size(tmp_path):
    """Its size is read by its offsets: where these lead out of it, the process would end."""

    class Damaged:
        nbytes = property(lambda self: pytest.fail("asked"))

        def validate(self, *, full):
            assert full
            raise pa.ArrowInvalid("offsets")

    with pytest.raises(pa.ArrowInvalid, match="offsets"):
        list(readers._bounded(tmp_path, [Damaged()]))


def test_an_arrow_stream_is_bounded(bounded, tmp_path):
    batch = pa.record_batch({"prompt": ["p" * BOUND], "completion": ["c"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, batch.schema, options=options) as writer:
            for _ in range(8):
                writer.write_batch(batch)
    with pytest.raises(DataError, match="Split it into several files"):
        read_records(tmp_path / "a.arrow")


def test_a_file_that_is_too_large_is_not_read_to_its_end(bounded, tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(1000 * BOUND)  # sparse
    with pytest.raises(DataError, match="Split it into several files"):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_line_of_many_megabytes_is_read(tmp_path, suffix):
    text = "word " * 2**21
    path = tmp_path / f"a.{suffix}"
    lines = {
        "jsonl": json.dumps({**ROW, "completion": text}),
        "csv": f"prompt,completion\np,{text}",
    }
    path.write_text(lines[suffix])
    assert read_records(path)[0].completion.strip() == text.strip()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_hundred_thousand_columns_are_named_in_a_line(tmp_path, suffix):
    names = [f"c{i}" for i in range(100_000 if suffix != "parquet" else 2_000)]
    path = tmp_path / f"wide.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(dict.fromkeys(names, "x")))
    elif suffix == "csv":
        path.write_text(",".join(names) + "\n" + ",".join(["x"] * len(names)))
    else:
        pq.write_table(pa.table({name: ["x"] for name in names}), path)
    with pytest.raises(DataError, match="more") as error:
        read_records(path)
    assert len(str(error.value)) < 2000


def test_nesting_and_packing_within_packing_are_told(tmp_path):
    path = tmp_path / "deep.json"
    path.write_bytes(b'{"prompt": ' * 100_000)
    with pytest.raises(DataError, match=r"deep|not JSON"):
        read_records(path)
    twice = tmp_path / "twice.jsonl.gz"
    twice.write_bytes(gzip.compress(gzip.compress(json.dumps(ROW).encode())))
    with pytest.raises(DataError):
        read_records(twice)
