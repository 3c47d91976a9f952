"""Read so many files that are nearly right, and count what comes of it.

    python tests/fuzz/fuzzing.py --cases 6000 [--seed 0] [READER ...]

prints for each reader how often which error came, and each error that isn't documented, with the
line that raised it and the shortest case. `--cases` is for each of the readers.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from readers import DOCUMENTED, READING

LONGEST_S = 10
MOST_BYTES = 2**30  # that memory may grow by


def fuzzed(name: str, n_cases: int, place: Path, *, start: int = 0) -> tuple[Counter, list[str]]:
    """How often each error came, and what is wrong; of a reader, from so many cases."""
    strategy, read = READING[name]
    seen: Counter[str] = Counter()
    wrong: dict[str, tuple[str, str]] = {}

    @seed(start)
    @settings(
        max_examples=n_cases,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def reads(case: object) -> None:
        folder = Path(tempfile.mkdtemp(dir=place))
        began, at = time.process_time(), ""
        try:
            read(case, folder)
            seen["read"] += 1
        except DOCUMENTED as error:
            seen[type(error).__name__] += 1
            at = "" if str(error).strip() else "no message"
        except SystemExit as error:  # arguments that can't be parsed, told on the terminal
            seen["exit status 2"] += 1
            at = "" if error.code == 2 else f"exit status {error.code}"
        except Exception as error:
            seen[type(error).__name__] += 1
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if "memlaw/" in f.filename
            ]
            where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
            at = f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
        finally:
            shutil.rmtree(folder)
        if (took := time.process_time() - began) > LONGEST_S:
            at = f"took {took:.0f} s"
        if at:
            key, shown = at.split(": ")[0], repr(case)
            if key not in wrong or len(shown) < len(wrong[key][1]):
                wrong[key] = (at, shown)

    random.seed(start)
    reads()
    return seen, [f"{at}: {shown[:600]}" for at, shown in wrong.values()]


def main() -> None:
    """Print the histograms; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READING), metavar="READER")
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    total, n_wrong = Counter[str](), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        for name in given_.readers:
            began = time.perf_counter()
            seen, wrong = fuzzed(name, given_.cases, Path(place), start=given_.seed)
            total += seen
            n_wrong += len(wrong)
            said = ", ".join(f"{kind} {n:,}" for kind, n in seen.most_common())
            took = time.perf_counter() - began
            print(f"{name}: {sum(seen.values()):,} cases in {took:.0f} s: {said}", flush=True)
            for line in wrong:
                print(f"  WRONG {line}", flush=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    said = ", ".join(f"{kind} {n:,}" for kind, n in total.most_common())
    print(f"all: {sum(total.values()):,} cases: {said}; memory grew by {grown / 2**20:.0f} MiB")
    sys.exit(1 if n_wrong or grown > MOST_BYTES else 0)


if __name__ == "__main__":
    main()
