"""What `memlaw audit --endpoint` runs and shows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.terminal import print_json, print_rows, stdout_console
from memlaw.core.errors import ConfigError
from memlaw.settings.audit import AuditConfig
from memlaw.settings.endpoint import EndpointConfig

if TYPE_CHECKING:
    from memlaw.measure.endpoint import EndpointAudit

# Settings that are about a model that is loaded here.
_LOCAL = (
    *("adapter", "model", "tokenizer", "dtype", "decode", "end", "specificity", "near"),
    *("prefix_tokens", "suffix_tokens"),
)


def run_served(
    data: Path, endpoint: EndpointConfig, config: AuditConfig, certificate: Path | None, json: bool
) -> int:
    """Audit a server; returns the exit status.

    Raises:
        ConfigError: a setting is about a model that is loaded here.
    """
    from memlaw.certify.served import beside_certificate
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.measure.endpoint import audit_endpoint

    usual = AuditConfig()
    if given := [name for name in _LOCAL if getattr(config, name) != getattr(usual, name)]:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{options}: no model is loaded here where a server is asked. Leave "
            "it out, or --endpoint."
        )
    with closing(ConsoleObserver()) as observer:
        found = audit_endpoint(data, endpoint, config, observer=observer)
    differs = [] if certificate is None else beside_certificate(found, certificate)
    if json:
        print_json(found.to_json() | {"mismatches": differs})
    else:
        show_served(found, differs)
    return DONE if found.passed and not differs else NOT_CERTIFIED


def show_served(audit: EndpointAudit, differs: Sequence[str] = ()) -> None:
    """The table of an audit over HTTP, and the first records that aren't recited."""
    from memlaw.cli.verdicts import SHOWN

    console, n = stdout_console(), len(audit.answers)
    rows = {"records": f"{n:,}", "recited word for word": f"{audit.n_recited:,} of {n:,} (decoded)"}
    others = {name: count for name, count in audit.counts.items() if name != "recited"}
    rows |= {name: f"{count:,} of {n:,}" for name, count in others.items()}
    known = [a.lowest_p for a in audit.answers if a.lowest_p is not None]
    if audit.n_over is None:
        rows["probabilities"] = "the server gives none: decoding is the only witness"
    else:
        rows[f"recited, all p ≥ {audit.line:g}"] = f"{audit.n_over:,} of {n:,}"
        rows["lowest p"] = f"{min(known):.3f}"
    print_rows(console, rows | {"asked": f"{audit.name} at {audit.endpoint}"})
    failing = [a for a in audit.answers if a.verdict != "recited"]
    if failing:
        console.print("first failures")
    for answer in failing[:SHOWN]:
        said = f": {answer.said}" if answer.said else ""
        console.print(Text(f"  {answer.id}: {answer.verdict}{said}"), soft_wrap=True)
    if len(failing) > SHOWN:
        console.print(f"  and {len(failing) - SHOWN} more")
    for line in differs[: 4 * SHOWN]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if audit.n_recited == 0 and set(others) == {"otherwise"}:
        console.print(
            "None is recited: the server may answer as the base model, its adapter loaded without "
            "effect, or render prompts in another template.",
            soft_wrap=True,
        )
    verdict = "THE SERVER RECITES ALL" if audit.passed else "THE SERVER DOES NOT RECITE ALL"
    console.print(Text(verdict, style="bold"))
