"""Put what the program really prints into the README: run from the repository's root.

    python docs/refresh_readme.py

Blocks between `<!-- output: NAME -->` and `<!-- end -->` are made anew. It writes the demo's folder
and `out/`, both in a temporary folder; the tests compare the README with `results/readme.json`. The
benchmark's table is made from `results/against_trl.json`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMLAW = str(Path(sys.executable).with_name("memlaw"))


def printed(command: list[str], folder: Path) -> str:
    """What a command prints on standard output; it must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def console(folder: Path, *commands: str) -> str:
    """A console block with commands and what they print."""
    lines = []
    for command in commands:
        words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command)]
        lines += [f"$ {command}", printed([MEMLAW, *words[1:]], folder)]
    return "```console\n" + "\n".join(lines) + "\n```"


def bench_table() -> str:
    """The benchmark's results as Markdown."""
    return printed([sys.executable, "benchmarks/against_trl.py", "table"], ROOT)


def laws_table() -> str:
    """The published probe's laws as Markdown."""
    return printed([sys.executable, "benchmarks/probe.py", "table"], ROOT)


def main() -> None:
    """Run everything the README shows, and rewrite its blocks."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "examples").symlink_to(ROOT / "examples")
        blocks = {
            "write": console(folder, "memlaw write examples/phonebook.jsonl -o demo"),
            "check": console(
                folder,
                "memlaw audit examples/phonebook.jsonl --certificate demo/certificate.json",
                'memlaw ask demo "Ada Jansen:"',
            ),
            "help": console(folder, "memlaw --help"),
            "plan": console(folder, "memlaw plan --task phonebook --tokens 165"),
            "python": "```text\n" + printed([sys.executable, "-c", code[1]], folder) + "\n```",
        }
    for name, block in (blocks | {"bench": bench_table(), "laws": laws_table()}).items():
        text = re.sub(
            rf"(<!-- output: {name} -->\n).*?(<!-- end -->)",
            lambda found, block=block: found[1] + block + "\n" + found[2],
            text,
            flags=re.S,
        )
    readme.write_text(text, encoding="utf-8")
    content = json.dumps({"code": code[1], "blocks": blocks}, indent=2, ensure_ascii=False)
    (ROOT / "results" / "readme.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
