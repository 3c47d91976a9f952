"""Settings given as a whole or one by one, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from memlaw.core.errors import ConfigError
from memlaw.settings.choices import resolve_objective

Config = TypeVar("Config")


def settled(kind: type[Config], config: Config | None, given: dict[str, Any]) -> Config:
    """The settings, given as a whole or one by one.

    Args:
        kind: dataclass of the settings.
        config: all settings; or
        given: some settings by name; the others keep their defaults.

    Raises:
        ConfigError: both are given, or a name isn't a setting's.
    """
    if config is not None and given:
        raise ConfigError("give either config or settings by name, not both.")
    return config if config is not None else with_settings(kind(), given)


def with_settings(config: Config, given: dict[str, Any]) -> Config:
    """`config` with some settings replaced. `layers` may be a number, `adapter` a string,
    `template_args` a mapping.

    Raises:
        ConfigError: a name isn't a setting's.
    """
    known = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - known):
        raise ConfigError(
            f"unknown setting(s) {', '.join(unknown)}. There are {', '.join(sorted(known))}."
        )
    given = dict(given)
    if isinstance(layers := given.get("layers"), int | list):
        given["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    if isinstance(given.get("objective"), str) and given["objective"] != "auto":
        given["objective"] = resolve_objective(given["objective"])
    if isinstance(arguments := given.get("template_args"), Mapping):
        arguments = [f"{name}={json.dumps(value)}" for name, value in arguments.items()]
    if arguments is not None:
        given["template_args"] = tuple(arguments)
    if isinstance(given.get("adapter"), str):
        given["adapter"] = Path(given["adapter"])
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


def as_arguments(name: str, value: Any) -> list[str]:
    """A setting as the command line takes it: `--rank 8`, `--no-whiten`, `--betas 0.9 0.99`.

    Args:
        name: the setting's.
        value: a number, text or boolean, or several; not None.
    """
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    words = [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    if len(words) == 1 and words[0].startswith("-"):  # would be read as an option of its own
        return [f"--{flag}={words[0]}"]
    return [f"--{flag}", *words]
