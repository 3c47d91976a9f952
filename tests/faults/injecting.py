"""Commands whose n-th file operation fails: run, looked at, and run again undisturbed.

A process with the shim preloaded (`python injecting.py FOLDER ...`) has torch and memlaw imported,
and forks for each case, so that one takes a fraction of a second. After each fault what the command
changes must be the old state or the new one, the command must have said so in one line, and the
same command, undisturbed, must end where one ends that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LONGEST_S = 60
BOOK = [("Ann:", "12"), ("Bo:", "7"), ("Cy:", "305")]
MORE = [("Ann:", "12"), ("Bo:", "8"), ("Cy:", "305"), ("Di:", "4")]


class Mode(NamedTuple):
    """What happens at the n-th operation: by number as in the shim, and the error."""

    how: int
    error: int = 0


MODES = {
    "ENOSPC": Mode(0, errno.ENOSPC),
    "EIO": Mode(0, errno.EIO),
    "EACCES": Mode(0, errno.EACCES),
    "EINTR": Mode(0, errno.EINTR),
    "killed": Mode(1),
    "full": Mode(2),  # from there on
    "gone": Mode(3),  # the folder that is written is removed by somebody else
}
KILLED = 9
_TEXTS = "--retain={work}/retain.txt --damage-text={work}/damage.txt --model={model}"
_TO_WRITE = (
    "write {work}/data.jsonl -o {work}/out --no-specificity --retention=0 --rank=8 --layers=all "
    f"--learning-rate=0.03 --max-epochs=100 {_TEXTS}"
)
_TO_PROBE = (
    "probe -o {work}/out --task=records:{work}/data.jsonl --ranks=1,2 --lengths=8 --steps=4 "
    + _TEXTS
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line, and what is to be seen of it.

    Attributes:
        line: its words, with `{work}` and `{model}`.
        after: the command whose result it begins with; None: with data alone.
        again: what is added where the first try left a run that was begun.
        made: what it makes or changes, in the working folder.
        halves: names of what a killed process may leave there, as a pattern: no reader takes it.
            A note of who had the lock is one, too.
        in_parts: it makes files one by one, each of them whole.
    """

    line: str
    after: str | None = None
    again: str = ""
    made: str = "out"
    halves: str = r"$^"
    in_parts: bool = False

    def is_begun(self, now: Mapping[str, str]) -> bool:
        """What is there is a run to go on with, and says so; or nothing yet."""
        if not {name for name in now if not re.match(_NOTHING, name)}:
            return True
        states = ("checkpoint.safetensors", "private/plan.json")
        return bool(self.again) and any(name in now for name in states)


_NOTHING = r"(.*/)?\.(lock|\w+\.\w+\.\w+)$"  # notes and halves of files, which the next run clears

_HALF = r"\..*\.\w{8}"  # a file that was being written beside

COMMANDS = {
    "write": Command(line=_TO_WRITE, again=" --resume"),
    "update": Command(line="update {work}/out {work}/more.jsonl", after="write"),
    "update into a new folder": Command(
        line="update {work}/out {work}/more.jsonl -o {work}/new", after="write", made="new"
    ),
    "revert": Command(line="revert {work}/out --to 1", after="update"),
    "shards": Command(line=f"{_TO_WRITE} --shards=2", again=" --resume"),
    "update of shards": Command(line="update {work}/out {work}/more.jsonl", after="shards"),
    "probe": Command(line=_TO_PROBE, halves=r"\.work-.*"),
    "audit": Command(
        line="audit {work}/data.jsonl --adapter {work}/out --tokens {work}/tokens.parquet",
        after="write",
        made="tokens.parquet",
        halves=_HALF,
    ),
    "export merged": Command(
        line="export {work}/out {work}/data.jsonl --to=merged -o {work}/new",
        after="write",
        made="new",
    ),
    "export gguf-lora": Command(
        line="export {work}/out {work}/data.jsonl --to=gguf-lora -o {work}/new",
        after="write",
        made="new",
    ),
    "report": Command(
        line="report {work}/out -o {work}/report.html",
        after="write",
        made="report.html",
        halves=_HALF,
    ),
    "tables": Command(
        line="report {work}/out -o {work}/tables --format=md",
        after="write",
        made="tables",
        in_parts=True,
        halves=_HALF,
    ),
    "sign": Command(line="sign {work}/out --key {work}/key.pem", after="write"),
}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of one run of a command."""

    status: int
    said: str
    log: Sequence[str] = ()


@dataclass(kw_only=True)
class Seen:
    """What one fault led to: `wrong` is empty where all is as it should be."""

    command: str
    n: int
    mode: str
    at: str
    status: int = 0
    state: str = ""
    said: str = ""
    wrong: list[str] = field(default_factory=list)


class Cage:
    """A cgroup whose memory ends: whoever takes more in it is killed by the kernel.

    Args:
        most_bytes: of memory; None: no limit, it is measured only.

    Raises:
        OSError: this process may not make one.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        root = Path("/sys/fs/cgroup")
        self.is_old = (root / "memory").is_dir()  # version 1
        self.folder = (root / "memory" if self.is_old else root) / f"cage-{os.getpid()}"
        self.folder.mkdir()
        try:
            if most_bytes is not None:
                self._file("memory.limit_in_bytes", "memory.max").write_text(str(most_bytes))
                if (swap := self.folder / "memory.swap.max").exists():
                    swap.write_text("0")
            self.most_bytes()  # or there is no such thing here
        except OSError:
            self.folder.rmdir()
            raise

    def enter(self) -> None:
        """This process is in it from now on; what it has already isn't counted."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def most_bytes(self) -> int:
        """The most that was taken at once so far."""
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    def _file(self, old: str, new: str) -> Path:
        return self.folder / (old if self.is_old else new)

    def __enter__(self) -> Cage:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()


class Lab:
    """Runs commands in children of this process, in folders of their own.

    Args:
        folder: an empty one, best in memory.
        shim: the preloaded library, by its path.
    """

    def __init__(self, folder: Path, shim: Path) -> None:
        self.folder, self.shim = folder, ctypes.CDLL(str(shim))
        self.shim.fault_log.restype = ctypes.c_char_p
        self.shim.fault_disarm.restype = ctypes.c_long
        self.model = folder / "model"
        make_model(self.model)
        self.states: dict[str, Path] = {}
        self.logs: dict[str, Sequence[str]] = {}
        self.ended: dict[tuple[str, str], list[str]] = {}
        same_every_time()
        tqdm.set_lock(threading.RLock())  # its own is shared with children, who die with it
        self.start = folder / "start"
        make_data(self.start)

    def state(self, name: str | None) -> Path:
        """The working folder as an undisturbed command leaves it; made on first use."""
        if name is None:
            return self.start
        if name not in self.states:
            command = COMMANDS[name]
            work = self._work(self.state(command.after))
            ran = self.run(command.line, work)
            if ran.status != 0:
                raise RuntimeError(f"{name}, undisturbed, ends in {ran.status}:\n{ran.said}")
            self.states[name] = self.folder / f"after {name}"
            shutil.copytree(work, self.states[name], symlinks=True)
            self.logs[name] = ran.log
            self._warm()
        return self.states[name]

    def _work(self, start: Path) -> Path:
        """The working folder, always the same path, as a copy of `start`."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work, symlinks=True)
        return work

    def _warm(self) -> None:
        """Import what the last child imported, so that the next ones have it."""
        for name in (self.folder / "modules").read_text().splitlines():
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)

    def run(
        self,
        line: str,
        work: Path,
        *,
        n: int = 0,
        mode: str = "EIO",
        gone: str = "",
        before_each: Callable[[], None] | None = None,
        kill_after_s: float | None = None,
        cage: Cage | None = None,
    ) -> Ran:
        """Run a command in a child whose n-th file operation in `work` goes wrong; 0: none does.

        With `kill_after_s` it is killed from outside, if it hasn't ended by then; in a `cage` by
        the kernel, once it takes more memory than there is.
        """
        told = self.folder / "told"
        child = os.fork()
        if child == 0:
            status = 99
            try:
                signal.alarm(LONGEST_S)
                if cage:
                    cage.enter()
                with open(told, "wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                status = self._in_child(line, work, n, mode, gone, before_each)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        whole = n == 0 and kill_after_s is None and not cage
        if not whole and status == -signal.SIGKILL:
            status = KILLED  # as the shim's
        lines = (self.folder / "log").read_text().splitlines() if whole else ()
        return Ran(status=status, said=told.read_text("utf-8", "replace"), log=lines)

    def _in_child(
        self,
        line: str,
        work: Path,
        n: int,
        mode: str,
        gone: str,
        before_each: Callable[[], None] | None,
    ) -> int:
        from memlaw import cli

        os.environ["MEMLAW_CACHE"] = str(work / "cache")
        tempfile.tempdir = str(work / "tmp")
        how = MODES[mode]
        words = line.format(work=work, model=self.model).split()
        removed, call = os.fsencode(work / gone), _CALL(before_each or 0)
        self.shim.fault_arm(os.fsencode(f"{work}/"), n, how.how, how.error, removed, call)
        status = cli.run(words)
        self.shim.fault_disarm()
        if n == 0:
            (self.folder / "log").write_bytes(self.shim.fault_log())
            (self.folder / "modules").write_text("\n".join(sys.modules))
        return status

    def tried(self, name: str, n: int, mode: str) -> Seen:
        """Let the n-th operation of a command go wrong, and see what becomes of it."""
        command = COMMANDS[name]
        self.state(name)
        work = self._work(self.state(command.after))
        ran = self.run(command.line, work, n=n, mode=mode, gone=command.made)
        seen = Seen(command=name, n=n, mode=mode, at=self.logs[name][n - 1], status=ran.status)
        self._look(command, seen, work)
        seen.wrong += _told(ran, seen.state)
        if ran.status not in (0, KILLED):
            seen.said = ran.said[-600:]
        if seen.state != "gone":
            self._again(command, seen, work)
        return seen

    def killed_everywhere(self, name: str) -> Iterator[Seen]:
        """What is left if a command is killed before each operation, from copies of one run."""
        command = COMMANDS[name]
        self.state(name)
        work = self._work(self.state(command.after))
        copies: list[str] = []
        place = self.folder / "copies"
        shutil.rmtree(place, ignore_errors=True)

        def copy() -> None:
            key = _key(work)
            copies.append(key)
            if not (place / key).exists():
                shutil.copytree(work, place / key, symlinks=True)
            (self.folder / "copied").write_text("\n".join(copies))

        self.run(command.line, work, before_each=copy)
        for n, key in enumerate((self.folder / "copied").read_text().splitlines(), 1):
            at = self.logs[name][n - 1]
            seen = Seen(command=name, n=n, mode="killed", at=at, status=KILLED)
            self._work(place / key)
            self._look(command, seen, work)
            self._again(command, seen, work)
            yield seen

    def killed_from_outside(self, name: str, times: int) -> Iterator[Seen]:
        """What is left if a command is killed at random moments of its time, seed 0."""
        command, draw = COMMANDS[name], random.Random(f"{name} 0")
        self.state(name)
        started = time.monotonic()
        self.run(command.line, self._work(self.state(command.after)))
        whole_s = time.monotonic() - started
        for n in range(1, times + 1):
            work = self._work(self.state(command.after))
            ran = self.run(command.line, work, kill_after_s=draw.uniform(0, whole_s))
            yield self._left_by(ran, name, n, "from outside", work)

    def starved(self, name: str, times: int) -> Iterator[Seen]:
        """What is left if the memory of a command's cgroup ends, at random limits, seed 0."""
        command, draw = COMMANDS[name], random.Random(f"{name} 0")
        self.state(name)
        with Cage() as cage:
            ran = self.run(command.line, self._work(self.state(command.after)), cage=cage)
            if ran.status != 0:
                raise RuntimeError(f"{name}, without a limit, ends in {ran.status}:\n{ran.said}")
            most = cage.most_bytes()
        for n in range(1, times + 1):
            work = self._work(self.state(command.after))
            with Cage(draw.randint(most // 20, most)) as cage:
                ran = self.run(command.line, work, cage=cage)
            yield self._left_by(ran, name, n, "starved", work)

    def _left_by(self, ran: Ran, name: str, n: int, mode: str, work: Path) -> Seen:
        """What a run left that was ended by something other than an operation."""
        seen = Seen(command=name, n=n, mode=mode, at="", status=ran.status)
        self._look(COMMANDS[name], seen, work)
        seen.wrong += _told(ran, seen.state)
        self._again(COMMANDS[name], seen, work)
        return seen

    def _look(self, command: Command, seen: Seen, work: Path) -> None:
        """What the command left: the old state, the new one, or a run that was begun."""
        before, after = self.state(command.after), self.state(seen.command)
        old, new = content(before / command.made), content(after / command.made)
        now = content(work / command.made, rf"{command.halves}|(.*/)?\.lock$")
        if now in (old, new):
            seen.state = "new" if now == new else "old"
        elif seen.mode == "gone" and command.after and command.made == "out":
            seen.state = "gone"  # what it begins with isn't there any more
        elif (command.in_parts and now.items() <= new.items()) or command.is_begun(now):
            seen.state = "begun"
        else:
            seen.state = "between"
            seen.wrong.append(f"neither old nor new: {_difference(now, new)}")

    def _again(self, command: Command, seen: Seen, work: Path) -> None:
        """The same command, with nothing in its way, must end where it would have."""
        key = (seen.command, _key(work))
        if seen.state == "old" and key[1] == _key(self.state(command.after)):
            return  # that is what the undisturbed run began with
        if key not in self.ended:
            self.ended[key] = self._ended(command, seen, work)
        seen.wrong += self.ended[key]

    def _ended(self, command: Command, seen: Seen, work: Path) -> list[str]:
        after = self.state(seen.command)
        new, clean = content(after / command.made), {p.name for p in after.iterdir()}
        found = []
        if seen.state != "new":
            ran = self.run(command.line + command.again, work)
            if ran.status != 0:
                found.append(f"again: status {ran.status}: {ran.said[-300:]}")
            elif (now := content(work / command.made, command.halves)) != new:
                found.append(f"again: another result: {_difference(now, new)}")
        left = {p.name for p in work.iterdir() if not re.match(command.halves, p.name)} - clean
        if left and seen.state != "new":
            found.append(f"again: left behind: {', '.join(sorted(left))}")
        return found


_CALL = ctypes.CFUNCTYPE(None)
_DRAWN = re.compile(r"(\.[\w.-]+\.|\.[\w.-]+-|memlaw-)\w{6,10}(?=/|$)")  # names of temporary files


def _key(work: Path) -> str:
    """The same for folders that differ in nothing but drawn names, halves of files, and times."""
    found = {}
    for name, value in content(work).items():
        same = _DRAWN.sub(r"\1*", name)
        found[same] = value if same == name else ""
    found = {name: value for name, value in found.items() if not name.startswith("tmp/")}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _told(ran: Ran, state: str) -> list[str]:
    """What is wrong with how a command ended."""
    if ran.status == KILLED:
        return []
    found = []
    if ran.status not in (0, 2, 3):
        found.append(f"status {ran.status}: {ran.said[-300:]}")
    if "Traceback (most recent call last)" in ran.said:
        found.append(f"a traceback: {ran.said[-900:]}")
    if ran.status == 0 and state not in ("new", "gone"):  # it may go when all is done
        found.append(f"status 0, but {state}")
    if ran.status in (2, 3) and not ran.said.splitlines()[-1].startswith("memlaw: "):
        found.append(f"no message: {ran.said[-300:]}")
    return found


def _difference(now: dict[str, str], new: dict[str, str]) -> str:
    missing, more = sorted(new.keys() - now.keys()), sorted(now.keys() - new.keys())
    other = sorted(name for name in now.keys() & new.keys() if now[name] != new[name])
    parts = (("missing", missing), ("more", more), ("other", other))
    return "; ".join(f"{what} {', '.join(names[:4])}" for what, names in parts if names)


# ------------------------------------------------------------ what is compared

_CHANGES = {"created", "wall_s", "timings", "speed", "machine", "training_s", "once_s", "resume"}


def content(path: Path, halves: str = r"$^") -> dict[str, str]:
    """A hash of each file, but for what is another in each run: times."""
    if not path.exists():
        return {}
    files = [path] if path.is_file() else [p for p in path.rglob("*") if not p.is_dir()]
    found = {}
    for file in files:
        name = "." if file == path else str(file.relative_to(path))
        if not re.match(halves, name):
            found[name] = hashlib.sha256(_lasting(file)).hexdigest()
    return found


def _lasting(file: Path) -> bytes:
    data = file.read_bytes()
    try:
        if file.suffix == ".json":
            whole = _without(json.loads(data))
            if "provenance" in whole:  # a probe's cell, and the seal over it
                del whole["provenance"], whole["sha256"]
            return json.dumps(whole, sort_keys=True).encode()
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as parts:
                return b"".join(parts.read(name) for name in sorted(parts.namelist()))
    except (ValueError, zipfile.BadZipFile):
        return b"half " + data
    if file.suffix in (".html", ".md"):
        return re.sub(rb"\d\d\d\d-\d\d-\d\d[^<|]*|\d+:\d\d|\b\d+ s\b", b"", data)
    if file.suffix == ".sig":
        return b"signed"
    return data


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in _CHANGES}
    return [_without(v) for v in value] if isinstance(value, list) else value


def same_every_time() -> None:
    """Keys aren't drawn, and no time is spent on the machine's speed."""
    from memlaw.train import speed

    secrets.token_bytes = lambda n=32: bytes(n)  # type: ignore[assignment]
    speed.matmul_peak = lambda *_, **__: 1e9  # type: ignore[assignment]


# ------------------------------------------------------------ what it begins with


def make_model(folder: Path) -> None:
    """A random model so small that three records take a second."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.auto import AutoModelForCausalLM

    sys.path.insert(0, str(HERE.parent))
    from words import byte_level

    words = byte_level("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        vocab_size=len(words),
        eos_token_id=words.eos_token_id,
        bos_token_id=words.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)


def make_data(work: Path) -> None:
    """Records, the same with changes, short texts, and a key."""
    for name in ("tmp", "cache"):
        (work / name).mkdir(parents=True)
    for name, book in (("data", BOOK), ("more", MORE)):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in book]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, seed in (("retain", 1), ("damage", 2)):
        words = random.Random(seed).choices(["the", "ring", "heron", "sang", "rain"], k=500)
        (work / f"{name}.txt").write_text(" ".join(words))
    with_key = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
    if shutil.which("openssl"):
        subprocess.run([*with_key, "-out", str(work / "key.pem")], check=True, capture_output=True)


def compiled(folder: Path) -> Path | None:
    """The shim, compiled; None where there is no C compiler, or this isn't Linux."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    shim = folder / "shim.so"
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(words, check=True)
    return shim


def faults(
    lab: Lab, names: Sequence[str], modes: Sequence[str], *, turn: int = 0, every: int = 1
) -> Iterator[Seen]:
    """A fault at each operation of each command, or every so many-th; its mode goes round.

    With the turns 0 to `len(modes)` - 1 each operation goes wrong in each way.
    """
    for name in names:
        lab.state(name)
        for n in range(1, len(lab.logs[name]) + 1, every):
            yield lab.tried(name, n, modes[(n // every + turn) % len(modes)])


def main() -> None:
    """Print a line of JSON for each fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shim", type=Path, required=True)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--killed", nargs="*", default=[])
    parser.add_argument("--moments", type=int, default=0)
    parser.add_argument("--limits", type=int, default=0)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    parser.add_argument("--turns", type=int, nargs="*", default=[0])
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    lab = Lab(given.folder, given.shim)
    for name in given.killed:
        for seen in lab.killed_everywhere(name):
            print(json.dumps(vars(seen)), flush=True)
    for name in given.commands if given.moments else ():
        for seen in lab.killed_from_outside(name, given.moments):
            print(json.dumps(vars(seen)), flush=True)
    for name in given.commands if given.limits else ():
        for seen in lab.starved(name, given.limits):
            print(json.dumps(vars(seen)), flush=True)
    for turn in given.turns:
        for seen in faults(lab, given.commands, given.modes, turn=turn, every=given.every):
            print(json.dumps(vars(seen)), flush=True)


if __name__ == "__main__":
    main()
