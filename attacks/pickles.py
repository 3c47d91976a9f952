"""Pickled objects where weights or arrays belong: unpickling runs what they say.

Tried: an adapter's weights, a base model's, an array of objects in snapshots.npz, and a pickle
under a safetensors file's name. memlaw reads weights by safetensors alone, and arrays without
objects.
"""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
from common import BOOK, MODEL, copied, refused, require


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def attempt(place: Path) -> str:
    """Read each of them."""
    import memlaw
    from memlaw.train.snapshots import read_snapshots
    from memlaw.writer.folder import read_checkpoint

    ran = place / "ran"
    evil = pickle.dumps(_Runs(ran))
    folder = copied(place)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(evil)
    said = refused(lambda: memlaw.audit(BOOK, adapter=folder, model=str(MODEL)))
    refused(lambda: memlaw.load(folder, model=str(MODEL)))
    (folder / "adapter_model.safetensors").write_bytes(evil)
    refused(lambda: memlaw.audit(BOOK, adapter=folder, model=str(MODEL)))
    (folder / "checkpoint.safetensors").write_bytes(evil)
    refused(lambda: read_checkpoint(folder, {}, {}))

    model = Path(shutil.copytree(MODEL, place / "model"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(evil)
    refused(lambda: memlaw.ask(None, "x", model=str(model)))

    array = np.array([_Runs(ran)], dtype=object)
    np.savez(place / "snapshots.npz", epochs=array, p=array)
    refused(lambda: read_snapshots(place / "snapshots.npz"))
    require(not ran.exists(), "a pickle was run")
    return said
