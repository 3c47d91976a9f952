"""Every file operation of each command fails once, or ends the process: what became of it.

    python benchmarks/faults.py [--every 1] [--turns 0] [--commands write update ...] [--no-kills]
                                [--moments 0] [--limits 0]

With each operation of an undisturbed run as the n-th: what a process that is killed there leaves
is looked at, and gone on from; and the operation fails, with ENOSPC, EIO, EACCES, EINTR, on a disk
that is full from there on, with the process killed in the middle of a write, or with its folder
removed by somebody else. Which of the seven goes round; with `--turns 0 1 2 3 4 5 6` each of them
has all. With `--moments N` each command is killed from outside (kill -9), too, at N random moments
of its time; with `--limits N` the memory of its cgroup ends, at N random limits between what it
takes and a twentieth of that (root only). A line of JSON for each fault goes to --save, and the
counts to standard output. Exit status 1 if anything was wrong. Needs Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ROOT / "tests" / "faults"
sys.path.insert(0, str(FAULTS))

from injecting import COMMANDS, compiled  # noqa: E402


def main() -> None:
    """Run them all, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--turns", type=int, nargs="*", default=[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--no-kills", action="store_true")
    parser.add_argument("--moments", type=int, default=0)
    parser.add_argument("--limits", type=int, default=0)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    counts: Counter[tuple[str, str, int, str]] = Counter()
    n_wrong = 0
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as place:
        shim = compiled(Path(place))
        if shim is None:
            sys.exit("It needs Linux and a C compiler, cc.")
        (work := Path(place) / "work").mkdir()
        words = [sys.executable, str(FAULTS / "injecting.py"), str(work), "--shim", str(shim)]
        words += ["--commands", *given.commands, "--turns", *map(str, given.turns)]
        words += ["--every", str(given.every), "--moments", str(given.moments)]
        words += ["--limits", str(given.limits)]
        words += [] if given.no_kills else ["--killed", *given.commands]
        environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as lab:
            assert lab.stdout is not None
            for line in lab.stdout:
                seen = json.loads(line)
                counts[seen["command"], seen["mode"], seen["status"], seen["state"]] += 1
                for text in seen["wrong"]:
                    n_wrong += 1
                    print(f"WRONG {seen['command']}, {seen['mode']} at {seen['n']}: {text[:300]}")
                if given.save:
                    with given.save.open("a", encoding="utf-8") as file:
                        file.write(line)
    for (command, mode, status, state), n in sorted(counts.items()):
        print(f"{command}, {mode}: {n} ended in status {status}, {state}")
    print(f"{counts.total():,} faults, {n_wrong} wrong")
    sys.exit(1 if n_wrong or lab.returncode else 0)


if __name__ == "__main__":
    main()
