"""How long a store of so many cells takes to list and read: python benchmarks/store.py 20000"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memlaw.law.store import Cell, CellStore, read_cells

ROOT = Path(__file__).resolve().parent.parent
CELLS_A_GROUP = 5


def main() -> int:
    """Fill a store, and read it at a half and in full."""
    n_cells = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        store = CellStore(folder)
        keys: list[str] = []
        for n in (n_cells // 2, n_cells):
            keys += fill(store, len(keys), n)
            began = time.perf_counter()
            read_cells(folder)
            read_s = time.perf_counter() - began
            began = time.perf_counter()
            n_found = len(store.finished(keys, print))
            print(
                f"{n_found} cells: read in {read_s:.2f} s, found finished (token tables "
                f"hashed) in {time.perf_counter() - began:.2f} s"
            )
    return 0


def fill(store: CellStore, start: int, end: int) -> list[str]:
    """Put made-up cells of a real one's size into a store: the built-in ones, with other seeds."""
    rows = json.loads((ROOT / "src" / "memlaw" / "law" / "builtin_cells.json").read_text("utf-8"))
    keys = []
    for first in range(start, end, CELLS_A_GROUP):
        group = range(first, min(first + CELLS_A_GROUP, end))
        cells = [_cell(rows[i % len(rows)], i) for i in group]
        store.put(cells)
        keys += [cell.key for cell in cells]
    return keys


def _cell(row: dict[str, Any], number: int) -> Cell:
    row = row | {"seed": number}
    config = {name: row[name] for name in ("task", "length", "rank", "seed")}
    curve = [
        {"epoch": n, "n_steps": n, "nll_nats": 1.0 / n, "n_under": 3, "n_records_over": 0}
        for n in range(1, 76)
    ]
    return Cell(
        config=config | {"training": row},
        status="success",
        result=row,
        curve=curve,
        provenance={"wall_s": 1.0},
        write_tokens=lambda path: path.write_bytes(b"x" * 6000),
    )


if __name__ == "__main__":
    sys.exit(main())
