"""What a folder remembers for its updates, and keeps to itself: its records, and the optimiser.

They lie in `private/`, which only its owner can read. A `.gitignore` beside it keeps git, and
uploads to a model hub, from taking it along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaw.core.commitment import PRIVATE_FOLDER, private_folder
from memlaw.core.errors import OutputError
from memlaw.core.files import write_tensors, write_text, writing
from memlaw.data.record import Record
from memlaw.writer.folder import GENERATIONS, IGNORE_FILE

if TYPE_CHECKING:
    import torch

RECORDS_FILE = "records.jsonl"
LEARNER_FILE = "learner.safetensors"
_IGNORED = f"""# The records' text, and what earlier generations recite: for this machine alone.
{PRIVATE_FOLDER}/
{GENERATIONS}/
"""


def write_private(
    out: Path,
    records: Iterable[Record],
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
) -> None:
    """Keep what an update of this folder needs.

    Args:
        out: the folder.
        records: what its adapter recites.
        tensors: the optimiser's memory, by the names of `Solver.state`.
        values: what else of the learner is kept; JSON-able.
    """
    folder = private_folder(out)
    with writing(folder):
        for half in folder.glob(".*"):  # a killed process was still writing it
            half.unlink()
    write_text(out / IGNORE_FILE, _IGNORED)
    lines = (
        {"id": record.id, "prompt": record.prompt, "completion": record.completion}
        for record in records
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(folder / RECORDS_FILE, text, private=True)
    content = {"memlaw": json.dumps(values)}
    write_tensors(folder / LEARNER_FILE, tensors, content, private=True)


def read_private_records(out: Path) -> list[Record] | None:
    """The records that a folder's adapter recites; None: they are not kept there.

    Raises:
        OutputError: they are kept, but can't be read.
    """
    path = out / PRIVATE_FOLDER / RECORDS_FILE
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [_record(json.loads(line)) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}). Remove it: the certificate's hashes then tell what has "
            "changed, as far as they can."
        ) from error


def _record(line: Mapping[str, Any]) -> Record:
    prompt = line["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(dict(message) for message in prompt)
    return Record(prompt=prompt, completion=str(line["completion"]), id=str(line["id"]))


def read_learner(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `write_private` kept of the learner; None: nothing, or nothing that can be read.

    Nothing depends on it but how an update learns.

    Raises:
        OutputError: the system refuses to read it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(out / PRIVATE_FOLDER / LEARNER_FILE, framework="pt") as file:
            values = json.loads(file.metadata()["memlaw"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        gate, push, still = values.get("gate"), values.get("push"), values.get("still", 0)
        if not (gate is None or (type(gate) is int and gate >= 0)):
            raise ValueError(f"a gate in column {gate!r}")
        if not (type(still) is int and still >= 0):
            raise ValueError(f"{still!r} columns that stand still")
        if not (push is None or (type(push) is float and 0 < push < math.inf)):
            raise ValueError(f"a hold of {push!r}")
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except (OSError, RuntimeError) as error:  # it is there: without it other weights would come out
        raise OutputError(
            f"{out / PRIVATE_FOLDER / LEARNER_FILE} can't be read ({error})."
        ) from error
    return tensors, values
