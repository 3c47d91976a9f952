"""Arguments to a command's settings: tyro parses them; settings may also come from a TOML file.

A command's settings are one flat dataclass. Its help shows them in groups: the options that people
use most under a few headings, all others under `more`.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from memlaw.core.errors import ConfigError
from memlaw.settings.given import as_arguments

Settings = TypeVar("Settings")
Groups = Mapping[str, tuple[str, ...]]  # heading: names of the options under it
MORE = "more"
_POSITIONAL = get_args(Positional[int])[1]
_DOCUMENTED = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def parse(kind: type[Settings], groups: Groups, command: str, args: list[str]) -> Settings:
    """The settings that a command's arguments ask for.

    Args:
        kind: of the settings: a dataclass that documents each field under `Attributes`.
        groups: the options that the help shows first; see `all_groups`.
        command: its name in the help, as `write`.
        args: the arguments behind the name.

    Raises:
        ConfigError: a setting is out of range, or `--config` doesn't name a file of settings.
        SystemExit: arguments that can't be parsed (2, with a message), or `--help` (0).
    """
    args = with_config_file(kind, args)
    parsed: Any = tyro.cli(_nested(kind, groups), prog=f"memlaw {command}", args=args)
    given: dict[str, Any] = {}
    for name, value in vars(parsed).items():
        given |= vars(value) if is_dataclass(value) else {name: value}
    return kind(**given)


def part_of(kind: type[Settings], given: Any) -> Settings:
    """Of the settings `given`, those that `kind` has: what the function takes that is called."""
    return kind(**{f.name: getattr(given, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def all_groups(kind: type, groups: Groups) -> dict[str, tuple[str, ...]]:
    """The groups that a help shows: `groups`, then the options that are in none, as `more`.

    Raises:
        ValueError: a name in `groups` isn't an option's, or stands there twice.
    """
    hints = get_type_hints(kind, include_extras=True)
    options = [f.name for f in fields(kind) if not _is_positional(hints[f.name])]
    first = [name for names in groups.values() for name in names]
    if wrong := {name for name in first if name not in options or first.count(name) > 1}:
        raise ValueError(f"not an option, or in two groups: {', '.join(sorted(wrong))}")
    rest = tuple(name for name in options if name not in first)
    return dict(groups) | ({MORE: rest} if rest else {})


def help_texts(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it is derived from say of each field."""
    return {
        name: " ".join(text.split())
        for parent in reversed(kind.__mro__)
        for name, text in _DOCUMENTED.findall(inspect.cleandoc(parent.__doc__ or ""))
    }


def _nested(kind: type, groups: Groups) -> type:
    """`kind` with a nested dataclass for each group, which is how tyro makes headings."""
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    texts = help_texts(kind)

    def option(name: str) -> tuple[str, Any, Field]:
        # Of no value the text says what it means; else tyro adds "(default: ...)".
        hint = "" if known[name].default in (None, ()) else None
        told = arg(help=texts[name], help_behavior_hint=hint)
        return name, Annotated[hints[name], told], field(default=known[name].default)

    parts = [option(name) for name in known if _is_positional(hints[name])]
    for heading, names in all_groups(kind, groups).items():
        group = make_dataclass(heading, [option(name) for name in names], kw_only=True)
        parts.append(
            (f"{heading}_options", Annotated[group, OmitArgPrefixes, arg(name=heading)], field())
        )
    return make_dataclass(
        kind.__name__, parts, kw_only=True, namespace={"__doc__": _first_paragraph(kind)}
    )


def _is_positional(hint: Any) -> bool:
    return _POSITIONAL in get_args(hint)


def _first_paragraph(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]


def with_config_file(kind: type, args: list[str]) -> list[str]:
    """Put the settings of `--config FILE.toml` before the others, which so have the last word.

    Raises:
        ConfigError: `--config` is given twice or without a file, or the file isn't one of settings.
    """
    args = [part for text in args for part in _apart(text)]
    if "--config" not in args:
        return args
    if args.count("--config") > 1:
        raise ConfigError("--config is given twice. Put all settings in one file.")
    place = args.index("--config")
    if place + 1 == len(args):
        raise ConfigError("--config needs a TOML file.")
    settings = _settings_of(kind, Path(args[place + 1]))
    rest = args[:place] + args[place + 2 :]
    # DATA goes first: behind a setting that takes a list it would be read as one of its items.
    first = next((n for n, text in enumerate(rest) if text.startswith("-")), len(rest))
    return rest[:first] + settings + rest[first:]


def _settings_of(kind: type, path: Path) -> list[str]:
    """A TOML file's settings as arguments."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    known = {f.name for f in fields(kind)} - {"data", "paths", "config"}
    settings: list[str] = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown key '{key}'. There are {', '.join(sorted(known))}.")
        settings += as_arguments(name, value)
    return settings


def _apart(text: str) -> list[str]:
    """`--config=FILE` as the two arguments it stands for; others as they are."""
    return ["--config", text.removeprefix("--config=")] if text.startswith("--config=") else [text]


def split_lists(args: list[str]) -> list[str]:
    """`--ranks 1,2,3` as `--ranks 1 2 3`, and likewise for the other lists of numbers."""
    lists = ("--ranks", "--lengths", "--seeds", "--layers")
    found: list[str] = []
    for text in args:
        flag, _, values = text.partition("=")
        if flag in lists and values:
            found += [flag, *values.split(",")]
        elif found and found[-1] in lists:
            found += text.split(",")
        else:
            found.append(text)
    return found
