"""Run the attempts: a line for each, whether it was held off and how; exit status 1 if one
wasn't.

python attacks/run.py [NAME ...]
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import RECORDED, Broken  # noqa: E402

ATTEMPTS = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("common", "run"))


def main(names: list[str]) -> int:
    """Run those named, or all."""
    broken = 0
    for name in names or ATTEMPTS:
        os.chdir(RECORDED)
        with tempfile.TemporaryDirectory() as place:
            try:
                print(f"held   {name}: {importlib.import_module(name).attempt(Path(place))}")
            except Broken as error:
                broken += 1
                print(f"BROKEN {name}: {error}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
