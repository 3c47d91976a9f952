"""`memlaw sign`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse

GROUPS = {"signature": ("key",)}


@dataclass(frozen=True, kw_only=True)
class SignArguments:
    """Sign a folder, so that one changed byte can be told. Needs the extra sign.

    Attributes:
        folder: folder of an adapter or an export.
        key: private key of an elliptic curve, PEM.
    """

    folder: Annotated[Positional[Path], arg(metavar="OUT")]
    key: Path


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(SignArguments, GROUPS, "sign", args)
    from memlaw.export.signing import sign

    print(f"signed: {sign(given.folder, given.key)}")
    return DONE
