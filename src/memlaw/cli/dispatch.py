"""The command line: find the command, run it, turn what it raises into an exit status.

A command is a module of this package by its name, with `run(args) -> exit status`.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence

from memlaw.core.errors import MemlawError
from memlaw.core.files import refused

DONE, NOT_CERTIFIED, BAD_REQUEST, UNFORESEEN, INTERRUPTED = 0, 1, 2, 3, 130

# The commands: a module each, and how each is used: what stands behind its name, and what it does.
COMMANDS = {
    "write": [("DATA -o OUT", "train an adapter until every record is recited, and certify it")],
    "audit": [
        ("DATA", "measure, token by token, what an adapter or a model recalls"),
        ("DATA --certificate OUT/certificate.json", "measure again what a certificate says"),
        ("DATA --adapter OUT --survival", "audit an adapter in every form in which it is run"),
        ("DATA --endpoint URL --name MODEL", "ask a server for each record"),
    ],
    "diff": [("OUT DATA", "say what must change so that an adapter recites exactly DATA")],
    "update": [("OUT DATA [-o NEW]", "change an adapter so that it recites exactly DATA")],
    "log": [("OUT", "show a folder's generations: records, rank, damage, seconds")],
    "revert": [("OUT --to N", "make a folder what it was in an earlier generation")],
    "ask": [("OUT PROMPT", "print what an adapter answers to a prompt")],
    "export": [("OUT DATA --to FORM -o DEST", "merge it, or make GGUF files, and audit those")],
    "push": [("OUT REPO", "upload what others may have of a folder to the Hugging Face hub")],
    "sign": [("OUT --key FILE", "sign a folder, so that one changed byte can be told")],
    "verify": [("OUT --key FILE", "check a folder against its signature")],
    "report": [("OUT -o FILE", "show all that was measured: a page, or figures and tables")],
    "probe": [("-o RUNS", "train a grid of ranks and lengths, and measure what each remembers")],
    "fit": [("RUNS", "fit the laws of memory to a probe, with intervals")],
    "plan": [("[RUNS] --tokens N", "which rank for N tokens? (--rank R: how many tokens?)")],
    "bench": [("objectives -o RUNS", "the same probe with each objective, compared pair by pair")],
}

_HELP = """usage: memlaw COMMAND ...

Write records into a language model word for word, and prove it.

commands:
{commands}

DATA is JSONL, JSON, CSV, TSV, Parquet or Arrow with the fields prompt and completion,
messages, or others that are understood (docs/data.md); a folder that datasets wrote; or
a plain text file, which is one long record.

exit status: 0 certified, or done; 1 not certified, or more damage than allowed; 2 bad
request; 3 an unforeseen fault, or a probe's cell failed; 130 interrupted
'memlaw COMMAND --help' explains a command; 'memlaw --version' prints the version.
"""
_USAGE_WIDTH = 22


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run the command line; returns the exit status."""
    # Large pages for PyTorch's tensors: on long records, first touches of small ones cost a
    # fifth of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # What a terminal's encoding has no sign for is shown as its code point; nothing is lost by it.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _dispatch(args)
        sys.stdout.flush()
        return status
    except MemlawError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("memlaw: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if said := _refused(error):
            _say(said)
            return BAD_REQUEST
        _say(_unforeseen(args, error))
        return UNFORESEEN


def _say(text: str) -> None:
    from memlaw.cli.terminal import warn

    warn(text)


# What a machine refuses, whoever asks; other errors of the system may be this program's fault.
_OF_MACHINES = (
    *("ENOSPC", "EDQUOT", "EIO", "EACCES", "EPERM", "EROFS", "EMFILE", "ENFILE", "EINTR"),
    "ENAMETOOLONG",  # no path of this program's own is
)


def _refused(error: Exception) -> str:
    """What to say where the machine is at fault: a full disk, a folder that isn't ours."""
    why = refused(error)
    if why not in {os.strerror(getattr(errno, name)) for name in _OF_MACHINES}:
        return ""
    file = getattr(error, "filename", None)
    place = f", {os.fsdecode(file)}" if isinstance(file, str | bytes) else ""
    return f"the system refuses a file{place} ({why}). Mend that, and repeat the command."


def _unforeseen(args: list[str], error: Exception) -> str:
    """One line on an error that nobody foresaw; all that is known of it goes into a file."""
    from memlaw import __version__

    first = (str(error).strip() or "no message").splitlines()[0]
    said = f"{type(error).__name__}: {first[:200].rstrip('.')}."
    try:
        handle, name = tempfile.mkstemp(prefix="memlaw-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"memlaw {__version__}, Python {sys.version}, {platform.platform()}\n")
            file.write(f"{shlex.join(['memlaw', *args])}\n\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        traceback.print_exception(error)
        name = "the traceback above"
    return (
        f"{said} This is a fault of memlaw's own. Please report it to its maintainers, with {name} "
        "(look into it first: it may hold words of yours) and what 'memlaw --version' prints."
    )


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return DONE if args else BAD_REQUEST
    if args[0] == "--version":
        from memlaw import __version__

        print(f"memlaw {__version__}")
        return DONE
    if args[0] not in COMMANDS:
        print(
            f"memlaw: no command '{args[0]}'. There are {', '.join(COMMANDS)}; see "
            "'memlaw --help'.",
            file=sys.stderr,
        )
        return BAD_REQUEST
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return importlib.import_module(f"memlaw.cli.{args[0]}").run(args[1:])


def help_text() -> str:
    """What `memlaw --help` prints."""
    lines = []
    for name, usages in COMMANDS.items():
        for behind, what in usages:
            usage = f"{name} {behind}"
            if len(usage) > _USAGE_WIDTH:
                lines.append(f"  {usage}")
                usage = ""
            lines.append(f"  {usage:<{_USAGE_WIDTH}} {what}")
    return _HELP.format(commands="\n".join(lines))
