"""What reads files that others wrote, each with files that are nearly right: what it may raise.

A case draws a file or a folder, writes it, and reads it. Only the errors that the package documents
may come out.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from memlaw.core.commitment import read_key
from memlaw.core.errors import MemlawError
from memlaw.data.prompts import read_prompts
from memlaw.data.readers import READERS
from memlaw.data.reading import read_records

HERE = Path(__file__).resolve().parent
FINISHED = HERE.parent / "recorded" / "folders" / "finished"

# ------------------------------------------------------------ values

_NAMES = st.sampled_from(
    [
        "prompt",
        "completion",
        "prompts",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "text",
        "system",
        "tools",
        "role",
        "content",
        "from",
        "value",
        "question",
        "answer",
        "paraphrases",
        "query",
        "target",
        "id",
    ]
)
_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\x00", "\x1b[2J", "<b>", "\ud83d\ude00", "\u202e", "a" * 300, "=1+1"]
    ),
)
_SCALARS = st.one_of(_TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(_NAMES, _TEXTS), inner, max_size=4)
    ),
    max_leaves=12,
)
_ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None, 3])
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": _ROLES, "content": st.one_of(_TEXTS, _VALUES)})
    | st.fixed_dictionaries({"from": _ROLES, "value": _TEXTS}),
    max_size=4,
)
_GOOD = st.builds(
    lambda n, text: {"prompt": f"q{n}", "completion": f"a{text}"}, st.integers(0, 9**6), _TEXTS
)
_ROWS = st.lists(_GOOD, min_size=1, max_size=4) | st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": _TEXTS, "completion": _TEXTS}),
        st.fixed_dictionaries({"messages": _MESSAGES}),
        st.fixed_dictionaries({"conversations": _MESSAGES}),
        st.fixed_dictionaries({"prompts": st.lists(_TEXTS, max_size=3), "completion": _TEXTS}),
        st.dictionaries(_NAMES, _VALUES, max_size=5),
        _VALUES,
    ),
    max_size=5,
)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _deep(n: int) -> bytes:
    return b"[" * n + b"]" * n


@st.composite
def _damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that are cut, changed, doubled, or whole."""
    data = draw(whole)
    how = draw(st.sampled_from(["whole", "cut", "changed", "put in", "doubled"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    if how == "changed" and data:
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if how == "put in":
        return data[:at] + draw(st.binary(max_size=8)) + data[at:]
    return data + data[at:] if how == "doubled" else data


# ------------------------------------------------------------ records


def _lines(rows: list[Any]) -> bytes:
    return b"\n".join(map(_json, rows))


def _table(rows: list[Any]) -> pa.Table | None:
    """Rows as an Arrow table, if it can have them."""
    try:
        return pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
    except (pa.ArrowException, OverflowError, TypeError, ValueError, UnicodeError):
        return None


def _parquet(rows: list[Any]) -> bytes:
    table, sink = _table(rows), pa.BufferOutputStream()
    if table is None or not table.num_columns:
        return b"PAR1PAR1"
    try:
        pq.write_table(table, sink)
    except (pa.ArrowException, UnicodeError):
        return b"PAR1"
    return bytes(sink.getvalue())


def _arrow(rows: list[Any]) -> bytes:
    table, sink = _table(rows), pa.BufferOutputStream()
    if table is None:
        return b"ARROW1"
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


_CSV = st.text("ab,;\t|\"'\n\r =promtcleinpu", max_size=60).map(
    lambda text: ("prompt,completion\n" + text).encode()
)
_RECORDS = {
    "jsonl": _damaged(_ROWS.map(_lines)) | st.integers(1, 30_000).map(_deep),
    "json": _damaged(st.one_of(_ROWS, _VALUES).map(_json)) | st.integers(1, 30_000).map(_deep),
    "csv": _damaged(_CSV) | st.binary(max_size=60),
    "tsv": _damaged(_CSV) | st.binary(max_size=60),
    "parquet": _damaged(_ROWS.map(_parquet)),
    "arrow": _damaged(_ROWS.map(_arrow)),
    "text": st.binary(max_size=60) | _TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass")),
}
assert set(_RECORDS) == set(READERS)
_PACKED = {name: lambda data: data for name in ("", ".gz", ".zst")}


@st.composite
def _record_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(_RECORDS)))
    data = draw(_RECORDS[name])
    if packing := draw(st.sampled_from([None, None, None, "gzip", "zstd"])):
        data = draw(_damaged(st.just(bytes(pa.compress(data, packing, asbytes=True)))))
        if packing == "zstd" or draw(st.booleans()):
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, packing) as file:
                file.write(data)
            data = bytes(sink.getvalue())
    return name, data


def read_a_record_file(case: tuple[str, bytes], folder: Path) -> None:
    name, data = case
    path = folder / f"data{READERS[name].suffixes[0]}"
    path.write_bytes(data)
    for records in (read_records(path),):
        assert records
        for record in records:
            assert record.completion
            record.sha256.encode()


def read_prompt_file(case: tuple[str, bytes], folder: Path) -> None:
    name, data = case
    path = folder / f"keep{READERS[name].suffixes[0]}"
    path.write_bytes(data)
    assert read_prompts(path)


def read_python_rows(case: list[Any], folder: Path) -> None:
    assert read_records(case)


# ------------------------------------------------------------ settings

_TOML = st.one_of(
    st.text(max_size=80),
    st.dictionaries(
        st.sampled_from(
            ["rank", "max-epochs", "layers", "prompt_field", "specificity", "data", "model"]
        ),
        st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.floats()),
        max_size=4,
    ).map(lambda d: "\n".join(f"{k} = {json.dumps(v)}" for k, v in d.items())),
    st.integers(1, 5000).map(lambda n: "rank = " + "[" * n + "]" * n),
    st.integers(1, 300).map(lambda n: "a." * n + "b = 1"),
)


def read_settings(case: str, folder: Path) -> None:
    from memlaw.cli.parse import parse
    from memlaw.cli.write import GROUPS, WriteArguments

    path = folder / "settings.toml"
    path.write_bytes(case.encode("utf-8", "surrogatepass"))
    parse(WriteArguments, GROUPS, "write", ["data.jsonl", "-o", "out", "--config", str(path)])


# ------------------------------------------------------------ what the package wrote


@st.composite
def _changed_json(draw: st.DrawFn, path: Path) -> bytes:
    """A JSON file of ours with one value changed, taken away, or put somewhere."""
    content = json.loads(path.read_text(encoding="utf-8"))
    place: Any = content
    for _ in range(draw(st.integers(0, 4))):
        if isinstance(place, dict) and place:
            key: Any = draw(st.sampled_from(sorted(place)))
        elif isinstance(place, list) and place:
            key = draw(st.integers(0, len(place) - 1))
        else:
            break
        if isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(_VALUES)
        else:
            del place[key]
    return _json(content)


def _file(name: str) -> st.SearchStrategy[bytes]:
    return st.one_of(
        _damaged(st.just((FINISHED / name).read_bytes())),
        _changed_json(FINISHED / name),
        _VALUES.map(_json),
        st.integers(1, 30_000).map(_deep),
    )


def _put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_a_certificate(case: bytes, folder: Path) -> None:
    from memlaw.certify.certificate import read_certificate

    read_certificate(_put(folder, "certificate.json", case)).claims()


def read_a_run(case: bytes, folder: Path) -> None:
    from memlaw.measure.adapter_folder import AdapterFolder
    from memlaw.settings.update import UpdateConfig
    from memlaw.writer.history import generations_of

    _put(folder, "run.json", case)
    found = AdapterFolder(folder)
    assert found.base_model
    UpdateConfig().over(found.run)
    generations_of(found.run)


def read_an_adapter(case: tuple[bytes, bytes], folder: Path) -> None:
    from memlaw.model.formats import adapter_base, adapter_shapes, invocation_ids

    _put(folder, "adapter_config.json", case[0])
    _put(folder, "adapter_model.safetensors", case[1])
    adapter_base(folder)
    invocation_ids(folder)
    adapter_shapes(folder)


def read_openings(case: bytes, folder: Path) -> None:
    _put(folder, "private/openings.json", case)
    read_key(folder)


def read_private(case: bytes, folder: Path) -> None:
    from memlaw.writer.private import read_private_records

    _put(folder, "private/records.jsonl", case)
    read_private_records(folder)


def read_a_token_table(case: bytes, folder: Path) -> None:
    from memlaw.measure.files import read_parquet

    read_parquet(_put(folder, "tokens.parquet", case)).summary()


def read_an_audit(case: bytes, folder: Path) -> None:
    from memlaw.measure.files import read_audit_json

    read_audit_json(_put(folder, "audit.json", case)).summary()


def read_snapshot_file(case: bytes, folder: Path) -> None:
    from memlaw.train.snapshots import read_snapshots

    read_snapshots(_put(folder, "snapshots.npz", case))


def read_a_checkpoint(case: bytes, folder: Path) -> None:
    from memlaw.writer.folder import checkpoint_clock, read_checkpoint

    _put(folder, "checkpoint.safetensors", case)
    checkpoint_clock(folder)
    read_checkpoint(folder, {}, {})


def read_an_index(case: bytes, folder: Path) -> None:
    from memlaw.shards.layout import read_index

    _put(folder, "index.json", case)
    read_index(folder)


def read_cell_files(case: bytes, folder: Path) -> None:
    from memlaw.law.store import read_cells

    _put(folder, f"cells/{'0' * 64}.json", case)
    read_cells(folder)


def read_cell_table(case: bytes, folder: Path) -> None:
    from memlaw.law.store import read_cells
    from memlaw.report.probe_view import probes_of

    rows = read_cells(_put(folder, "cells.json", case))
    probes_of(rows, name="cells")


def read_an_answer(case: bytes, folder: Path) -> None:
    from memlaw.measure.http_client import _reply

    reply = _reply(case, streams=case.startswith(b"data:"))
    assert isinstance(reply.text, str)


# ------------------------------------------------------------ safetensors whose headers lie


@st.composite
def _safetensors(draw: st.DrawFn) -> bytes:
    sizes = st.integers(-4, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, -1])
    names = st.sampled_from(
        ["seen.p", "a", "__metadata__", "../x", "base_model.model.x.lora_A.weight"]
    )
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "x", 3]),
            "shape": st.lists(sizes, max_size=3),
            "data_offsets": st.lists(sizes, min_size=1, max_size=3),
        }
    )
    header = _json(draw(st.dictionaries(names, st.one_of(entry, _VALUES), max_size=3)))
    length = draw(st.sampled_from([len(header), len(header) + 1, 0, 2**20, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + header + bytes(draw(st.integers(0, 64)))


def _whole_checkpoint() -> bytes:
    from safetensors.numpy import save

    meta = {"memlaw": json.dumps({"identity": {}, "engine": {}, "curve": []})}
    return save({"seen.p": np.zeros((2, 3), np.float16)}, metadata=meta)


def _zip(data: bytes = b"") -> bytes:
    import io

    file = io.BytesIO()
    np.savez_compressed(file, epochs=np.array([1, 2], np.int32), p=np.zeros((2, 3), np.float16))
    return file.getvalue()


_ANSWERS = st.one_of(
    _damaged(
        st.just(b'{"model":"m","choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}')
    ),
    st.fixed_dictionaries({"choices": st.one_of(_VALUES, st.lists(_VALUES, max_size=2))}).map(
        _json
    ),
    st.fixed_dictionaries(
        {"choices": st.just([{"message": {"content": "x"}}]), "model": _VALUES, "error": _VALUES}
    ).map(_json),
    st.fixed_dictionaries(
        {
            "choices": st.lists(
                st.fixed_dictionaries(
                    {
                        "message": st.fixed_dictionaries({"content": _VALUES}),
                        "finish_reason": _VALUES,
                        "logprobs": st.one_of(
                            _VALUES,
                            st.fixed_dictionaries({"content": _VALUES}),
                            st.fixed_dictionaries({"token_logprobs": st.lists(_SCALARS)}),
                        ),
                    }
                ),
                max_size=2,
            )
        }
    ).map(_json),
    _VALUES.map(_json),
    st.integers(1, 30_000).map(_deep),
    st.lists(_VALUES, max_size=3).map(lambda v: b"".join(b"data: " + _json(x) + b"\n" for x in v)),
)
_CELLS = st.one_of(
    st.lists(
        st.dictionaries(
            st.sampled_from(["task", "length", "rank", "seed", "status", "key"]), _VALUES
        )
    ),
    _VALUES,
).map(_json)

READING: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    "record file": (_record_files(), read_a_record_file),
    "prompt file": (_record_files(), read_prompt_file),
    "Python rows": (_ROWS, read_python_rows),
    "TOML": (_TOML, read_settings),
    "certificate": (_file("certificate.json"), read_a_certificate),
    "run.json": (_file("run.json"), read_a_run),
    "adapter": (
        st.tuples(_file("adapter_config.json"), _safetensors() | st.binary(max_size=40)),
        read_an_adapter,
    ),
    "openings": (st.one_of(_VALUES.map(_json), st.binary(max_size=40)), read_openings),
    "private records": (_damaged(_ROWS.map(_lines)), read_private),
    "token table": (
        _damaged(st.just((FINISHED / "tokens.parquet").read_bytes()))
        | _damaged(_ROWS.map(_parquet)),
        read_a_token_table,
    ),
    "audit": (
        st.one_of(
            _VALUES.map(_json),
            st.fixed_dictionaries({"records": st.lists(_VALUES, max_size=2)}).map(_json),
            st.integers(1, 30_000).map(_deep),
        ),
        read_an_audit,
    ),
    "snapshots": (_damaged(st.just(_zip())), read_snapshot_file),
    "checkpoint": (_safetensors() | _damaged(st.just(_whole_checkpoint())), read_a_checkpoint),
    "index": (
        st.one_of(
            _VALUES.map(_json),
            st.fixed_dictionaries(
                {"format": st.just(1), "adapters": _VALUES, "records": _VALUES}
            ).map(_json),
            st.integers(1, 30_000).map(_deep),
        ),
        read_an_index,
    ),
    "cell file": (st.one_of(_VALUES.map(_json), st.binary(max_size=80)), read_cell_files),
    "cell table": (_CELLS, read_cell_table),
    "endpoint's answer": (_ANSWERS, read_an_answer),
}
DOCUMENTED = (MemlawError,)
