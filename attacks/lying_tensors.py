"""Safetensors files whose headers lie: tensors that overlap, reach beyond the end, or are huge.

A reader that believes a header allocates what it says, or shows memory that isn't the file's. The
library `safetensors` checks that tensors lie one behind the other and end where the file does,
and that shapes fit; memlaw must turn its refusal into a message, and allocate nothing before.
"""

import json
import resource
import struct
from pathlib import Path
from typing import Any

from common import BOOK, MODEL, copied, refused, require

_NAME = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
LIES: dict[str, dict[str, Any]] = {
    "overlap": {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    },
    "beyond the end": {_NAME: {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}},
    "huge": {_NAME: {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 16]}},
    "overflow": {_NAME: {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 0]}},
    "backwards": {_NAME: {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "a name that leads out": {"../../x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
}


def attempt(place: Path) -> str:
    """Read each as an adapter's weights, as a checkpoint, and as a base model."""
    import memlaw
    from memlaw.writer.folder import read_checkpoint

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    for name, header in LIES.items():
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(24)
        folder = copied(place / name)
        (folder / "adapter_model.safetensors").write_bytes(data)
        said = refused(lambda: memlaw.audit(BOOK, adapter=folder, model=str(MODEL)))  # noqa: B023
        (folder / "checkpoint.safetensors").write_bytes(data)
        refused(lambda: read_checkpoint(folder, {}, {}))  # noqa: B023
    folder = copied(place / "header")
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(lambda: memlaw.audit(BOOK, adapter=folder, model=str(MODEL)))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    require(grown < 2**30, f"memory grew by {grown / 2**20:.0f} MiB")
    return said
