"""Where the cached engine keeps what the frozen layers compute."""

from __future__ import annotations

import mmap
import os
import tempfile

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from memlaw.core.errors import ConfigError


class Activations:
    """Rows of activations, in the model's memory or in a temporary file.

    The file has no name and vanishes with the process. Of its pages, only those of the rows at
    hand stay in the process's memory.

    Args:
        n: rows.
        width: of a row.
        dtype: of its numbers.
        device: where rows are wanted.
        on_disk: keep them in a file, in the folder for temporary files.
    """

    def __init__(
        self, n: int, width: int, dtype: torch.dtype, device: torch.device, *, on_disk: bool
    ) -> None:
        self.device = device
        self.mapping: mmap.mmap | None = None
        if not on_disk:
            self.rows = torch.empty(n, width, dtype=dtype, device=device)
            return
        with tempfile.TemporaryFile(prefix="memlaw-activations-") as file:
            n_bytes = n * width * dtype.itemsize
            try:
                if hasattr(os, "posix_fallocate"):  # a disk found full later would be fatal
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    file.truncate(n_bytes)
            except OSError as error:
                raise ConfigError(
                    f"no room for {n_bytes / 1e6:,.0f} MB of activations in "
                    f"{tempfile.gettempdir()} ({error.strerror}). Name another folder in TMPDIR, "
                    "or raise --cache-mb to keep them in memory."
                ) from error
            self.mapping = mmap.mmap(file.fileno(), n_bytes)
        self.rows = torch.frombuffer(self.mapping, dtype=dtype).view(n, width)

    def read(self, places: Int64[Tensor, "S"]) -> Shaped[Tensor, "S width"]:
        """The rows at `places` [S] (on the CPU), as [S, width] on the device."""
        found = self.rows[places.to(self.rows.device)].to(self.device)
        self._let_go()
        return found

    def write(self, places: Int64[Tensor, "S"], values: Shaped[Tensor, "S width"]) -> None:
        """Put [S, width] at `places` [S] (on the CPU)."""
        self.rows[places.to(self.rows.device)] = values.to(self.rows.device)
        self._let_go()

    def _let_go(self) -> None:
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)
