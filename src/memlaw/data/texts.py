"""General text: for the retention penalty, for measuring damage, and for the probe's noise task."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from memlaw.core.errors import ConfigError, DataError

# Modules of Python's library whose docstrings hold much prose. Neither the text to retain nor the
# text that damage is measured on comes from there.
_WORDY = """argparse ast asyncio.base_events calendar cmd codecs collections configparser csv
datetime decimal difflib doctest email.message enum fileinput fractions ftplib functools heapq
imaplib inspect ipaddress locale logging mailbox nntplib optparse os pathlib pdb pickle platform
poplib pprint pydoc random sched shutil smtplib socket statistics string subprocess tarfile
tempfile textwrap threading tokenize trace turtle typing unittest.case unittest.mock
urllib.parse urllib.request uuid weakref xml.dom.minidom zipfile"""
_LEAST_CHARS = 120
DOCUMENTATION = "pydoc_data.topics, odd topics"  # the name of the text that damage is measured on


@dataclass(frozen=True, kw_only=True)
class GeneralTexts:
    """The text of the retention penalty, and a text that training doesn't see.

    Attributes:
        retained: the text on which training penalises changed predictions.
        unseen: the text that damage is measured on.
        unseen_name: where `unseen` comes from.
    """

    retained: str
    unseen: str
    unseen_name: str


def general_texts(
    retain: str | Path | None = None, damage_text: str | Path | None = None
) -> GeneralTexts:
    """Both texts, from files or the built-in ones.

    Args:
        retain: file of the text to retain; None for the built-in one.
        damage_text: file of the text to measure damage on; None for the built-in one.

    Raises:
        DataError: a file can't be read as UTF-8.
        ConfigError: they are the same text, or training would see the prose that is measured on.
    """
    unseen, name = unseen_text(damage_text)
    retained = retained_text(retain)
    if retained in (unseen, prose_text()[0]):
        raise ConfigError(
            "the text to retain is the text to measure damage on: it must be text that training "
            "doesn't see."
        )
    return GeneralTexts(retained=retained, unseen=unseen, unseen_name=name)


def unseen_text(path: str | Path | None = None) -> tuple[str, str]:
    """The text that damage is measured on, and a name for it.

    By default every second topic of Python's language reference, which comes with each CPython as
    `pydoc_data.topics`.

    Raises:
        DataError: `path` can't be read as UTF-8.
    """
    if path is None:
        return _topics(1), DOCUMENTATION
    return _read(path), str(path)


@functools.cache
def prose_text() -> tuple[str, str]:
    """Prose that nothing is trained on, and a name for it.

    70,000 characters from "Alice's Adventures in Wonderland", by Lewis Carroll (1865, in the public
    domain), in the edition of the Canterbury corpus (`alice29.txt`).
    """
    text = (files("memlaw.data") / "prose.txt").read_text(encoding="utf-8")
    return text, "Alice's Adventures in Wonderland"


def retained_text(path: str | Path | None = None) -> str:
    """The text on which training keeps the model's predictions.

    By default the topics that damage isn't measured on, without the paragraphs that are in both
    halves.

    Raises:
        DataError: `path` can't be read as UTF-8.
    """
    if path is not None:
        return _read(path)
    unseen = set(_topics(1).split("\n\n"))
    return "\n\n".join(part for part in _topics(0).split("\n\n") if part not in unseen)


def _topics(first: int) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[first::2])


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}).") from error


def sha256_of(text: str) -> str:
    """Hash of a text, as in `Damage.text_sha256`."""
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def natural_prose() -> str:
    """English prose that comes with every CPython: paragraphs of its library's docstrings."""
    found: dict[str, None] = {}
    for name in _WORDY.split():
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    line = " ".join(paragraph.split())
                    if _is_prose(line):
                        found[line] = None
    return "\n\n".join(found)


def _is_prose(line: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in line)
    return (
        len(line) >= _LEAST_CHARS
        and line[0].isupper()
        and line[-1] in ".:"
        and ">>>" not in line
        and letters > 0.93 * len(line)
    )
