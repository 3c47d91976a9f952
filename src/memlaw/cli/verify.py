"""`memlaw verify`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.parse import parse
from memlaw.cli.terminal import visible
from memlaw.core.errors import SignatureError

GROUPS = {"signature": ("key",)}


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Check a folder against the signature in it. Needs the extra sign.

    Attributes:
        folder: folder that was signed.
        key: the signer's public key, PEM.
    """

    folder: Annotated[Positional[Path], arg(metavar="OUT")]
    key: Path


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(VerifyArguments, GROUPS, "verify", args)
    from memlaw.export.signing import verify

    try:
        verify(given.folder, given.key)
    except SignatureError as error:
        print(visible(str(error)))
        return NOT_CERTIFIED
    print(f"{given.folder} is what was signed.")
    return DONE
