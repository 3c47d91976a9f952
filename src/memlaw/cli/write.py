"""`memlaw write`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE, INTERRUPTED, NOT_CERTIFIED
from memlaw.cli.parse import parse, part_of
from memlaw.cli.terminal import duration, print_rows, quiet_libraries, stdout_console
from memlaw.core.errors import ConfigError
from memlaw.settings.write import WriteConfig

if TYPE_CHECKING:
    from memlaw.train.speed import Speed
    from memlaw.writer.result import WriteResult

_OF_SHARDS = ("launcher", "ray_address", "ray_cpus", "ray_gpus")
GROUPS = {
    "data": ("out", "prompt_field", "completion_field"),
    "model": ("model", "device"),
    "training": ("rank", "max_epochs"),
    "harm": ("max_damage", "min_specificity", "specificity", "keep", "activated"),
    "run": ("resume", "config"),
}


@dataclass(frozen=True, kw_only=True)
class WriteArguments(WriteConfig):
    """Train an adapter until every record is recited, and certify it.

    Attributes:
        data: the records: JSONL, JSON, CSV, TSV, Parquet, Arrow, a folder of datasets, or plain
            text.
        out: folder to create, for adapter, certificate, token table, run log and model card.
        shards: spread the records over so many adapters, each in a folder of its own, with one
            certificate over all; auto: as many as none holds more than 200 records, or 32 kB of
            text (default: one adapter).
        launcher: of shards. local writes one after the other; ray writes each as a Ray task.
        ray_address: address of a Ray cluster (default: the one this machine belongs to, or a new
            one).
        ray_cpus: CPUs per Ray task.
        ray_gpus: GPUs per Ray task.
        config: TOML file with options by these names; options on the command line win.
    """

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    out: Annotated[Path, arg(aliases=["-o"])]
    shards: int | Literal["auto"] | None = None
    launcher: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_cpus: float = 2
    ray_gpus: float = 0
    config: Path | None = None


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(WriteArguments, GROUPS, "write", args)
    quiet_libraries()
    usual = WriteArguments(data=given.data, out=given.out)
    odd = [name for name in _OF_SHARDS if getattr(given, name) != getattr(usual, name)]
    if odd and given.shards is None:
        raise ConfigError(
            f"--{odd[0].replace('_', '-')} is about shards. Give --shards, or leave it out."
        )
    if given.shards is not None:
        from memlaw.cli.shards import run_write

        return run_write(given, part_of(WriteConfig, given))
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.writer.folder import CHECKPOINT_FILE
    from memlaw.writer.run import write

    config = part_of(WriteConfig, given)
    with closing(ConsoleObserver()) as observer:
        try:
            result = write(given.data, given.out, config, observer=observer)
        except KeyboardInterrupt:
            if (given.out / CHECKPOINT_FILE).is_file():
                observer.notice(
                    "Interrupted. To continue, repeat the command with --resume: the state is in "
                    f"{given.out}."
                )
            else:
                observer.notice("Interrupted before there was anything to keep.")
            return INTERRUPTED
    show_write(result)
    return DONE if result.succeeded else NOT_CERTIFIED


_TO_CONTINUE = "To continue, train longer (--resume --max-epochs N) or use a higher --rank."


def time_taken(wall_s: float, once_s: float) -> str:
    """How long it took; and how much of that a next run doesn't take, where it can be noticed."""
    noticed = once_s > max(5, wall_s / 20)
    return duration(wall_s) + (
        f", {duration(once_s)} of it once for this base model" if noticed else ""
    )


def show_write(result: WriteResult, to_continue: str = _TO_CONTINUE) -> None:
    """The closing table; and how to go on where it didn't succeed."""
    from memlaw.cli.verdicts import audit_rows, print_failures, print_specificity
    from memlaw.measure.harm import KINDS

    audit = result.audit
    rows = audit_rows(audit) | {
        "bits stored": f"{result.bits_stored:,.0f}",
        "parameters": f"{result.n_parameters:,} (rank {result.rank})",
        "bits per parameter": f"{result.bits_per_parameter:.3f}",
        **{
            f"certified, {name}": f"{found.n_certified:,} of {len(found.records):,} (lowest p "
            f"{min(r.min_p for r in found.records):.3f})"
            for name, found in result.forms.items()
        },
        **dict(harm.row() for harm in result.harms.values()),
        "epochs": f"{result.epochs} ({result.stopped_because})",
        "time": time_taken(result.wall_s, result.once_s),
        "speed": _speed(result.speed),
        "folder": str(result.out),
    }
    console = stdout_console()
    print_rows(console, rows)
    print_failures(console, audit)
    console.print(Text("CERTIFIED" if result.certified else "NOT CERTIFIED", style="bold"))
    print_specificity(console, result.specificity)
    for name in result.above_bounds:
        kind, harm = KINDS[name], result.harms[name]
        side = "above" if kind.bound.startswith("max") else "against"
        console.print(
            f"BUT NOT HARMLESS: {harm.too_high()}{harm.unit and ' '}{harm.unit}, {side} "
            f"--{kind.bound.replace('_', '-')} {kind.limit(result.bounds[name]):g}"
        )
    for name in result.not_robust_to:
        found = result.forms[name]
        console.print(
            f"BUT NOT ROBUST TO {name}: there {found.n_certified:,} of {len(found.records):,} "
            "are certified"
        )
    if not result.succeeded:
        if result.n_left_out:
            console.print(
                f"{result.n_left_out} record(s) were left out at the end: too far from complete "
                "to finish in the epochs that were left."
            )
        if to_continue:
            console.print(to_continue)


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "no epoch trained"
    return (
        f"{speed.tokens_per_s:,.0f} tokens/s, {speed.flop_per_s / 1e9:,.0f} GFLOP/s: "
        f"{speed.share_of_peak:.0%} of this machine's {speed.peak_flop_per_s / 1e9:,.0f} in "
        f"{speed.peak_dtype} matrix products"
    )
