"""What training saw: the probability of each target token, epoch by epoch, in little space.

Example:
    >>> import numpy as np
    >>> kept = Snapshots(n_tokens=2)
    >>> for epoch in (1, 2, 3):
    ...     kept.add(epoch, np.array([0.1 * epoch, 0.3 * epoch]))
    >>> kept.until(2).epochs
    [1, 2]
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from memlaw.core.errors import DataError
from memlaw.core.files import atomic_path

SNAPSHOTS_FILE = "snapshots.npz"
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, RuntimeError)  # what arrays in it raise
_MOST_EPOCHS = 200
_MOST_VALUES = 4_000_000  # 8 MB


class Snapshots:
    """At most 200 of the epochs, fewer where there are many tokens.

    Which ones are kept depends on nothing but the last epoch: every one, then every second, every
    fourth …, so that an interrupted and resumed run keeps the same ones as one that wasn't.

    Args:
        n_tokens: target tokens of all records.

    Attributes:
        epochs: those kept, counted from 1.
        p: for each of them [n_tokens] float16 in [0, 1], in the token table's order; each
            record's tokens as they were just before the step that it took part in.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.epochs: list[int] = []
        self.p: list[np.ndarray] = []

    def add(self, epoch: int, p: np.ndarray) -> None:
        """Keep what an epoch saw, and let go of what is too much.

        Args:
            epoch: its number, above all those before.
            p: [n_tokens] in [0, 1].
        """
        most = max(2, min(_MOST_EPOCHS, _MOST_VALUES // max(1, self.n_tokens)))
        stride = 1
        while epoch > most * stride:
            stride *= 2
        self.epochs.append(epoch)
        self.p.append(np.array(p, dtype=np.float16))
        self.p = [p for e, p in zip(self.epochs, self.p, strict=True) if e % stride == 0]
        self.epochs = [e for e in self.epochs if e % stride == 0]

    def until(self, epoch: int) -> Snapshots:
        """Those of the first so many epochs."""
        found = Snapshots(self.n_tokens)
        found.epochs = [e for e in self.epochs if e <= epoch]
        found.p = self.p[: len(found.epochs)]
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """`epochs` [E] int32 and `p` [E, n_tokens] float16."""
        p = np.stack(self.p) if self.p else np.zeros((0, self.n_tokens), np.float16)
        return {"epochs": np.array(self.epochs, np.int32), "p": p}

    @classmethod
    def from_arrays(cls, epochs: np.ndarray, p: np.ndarray) -> Snapshots:
        """What `arrays` gave."""
        found = cls(p.shape[1])
        found.epochs, found.p = epochs.tolist(), list(p)
        return found

    def write(self, path: Path) -> None:
        """Write them as `.npz`, atomically."""
        kept = self.arrays()
        with atomic_path(path) as work, work.open("wb") as file:
            np.savez_compressed(file, epochs=kept["epochs"], p=kept["p"])


def read_snapshots(path: Path) -> Snapshots:
    """Read what `Snapshots.write` wrote.

    Raises:
        DataError: it can't be read.
    """
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return Snapshots.from_arrays(file["epochs"], file["p"])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, *_MALFORMED) as error:
        raise DataError(
            f"{path} can't be read ({error}). Remove it: the rest of the folder does without."
        ) from error
