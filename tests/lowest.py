"""Print constraints for pip: the lowest version of each package that pyproject.toml allows.

Of what runs when memlaw is used, and of what it reads; not of the tools that check its code.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
read = [line for line in extras["dev"] if line.startswith("datasets")]
for line in (*project["dependencies"], *extras["report"], *extras["ray"], *read):
    name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
    print(f"{name}=={lowest}")
