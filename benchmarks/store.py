"""How long a store of so many cells takes to list and read: python benchmarks/store.py 20000"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memlaw.law.store import Cell, CellStore, read_cells

CELLS_A_GROUP = 5


def main() -> int:
    """Fill a store with made-up cells of a real one's size, and read it at a half and in full."""
    n_cells = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    rows = json.loads(
        (Path(__file__).parents[1] / "src" / "memlaw" / "law" / "builtin_cells.json").read_text()
    )
    with tempfile.TemporaryDirectory() as folder:
        store = CellStore(folder)
        keys = []
        for start in range(0, n_cells, CELLS_A_GROUP):
            cells = [_cell(rows[0] if rows else {}, start + i) for i in range(CELLS_A_GROUP)]
            store.put(cells)
            keys += [cell.key for cell in cells]
            if start + CELLS_A_GROUP in (n_cells // 2, n_cells):
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


def _cell(row: dict[str, Any], number: int) -> Cell:
    config = {"task": "noise:1", "length": 64, "rank": 2, "seed": number, "training": {}}
    curve = [
        {"epoch": n, "n_steps": n, "nll_nats": 1.0 / n, "n_under": 3, "n_records_over": 0}
        for n in range(1, 76)
    ]
    return Cell(
        config=config | {"training": row},
        status="success",
        result=dict(row),
        curve=curve,
        provenance={"wall_s": 1.0},
        write_tokens=lambda path: path.write_bytes(b"x" * 6000),
    )


if __name__ == "__main__":
    sys.exit(main())
