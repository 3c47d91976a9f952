"""What `write --shards`, and `update` and `audit --certificate` of such folders, run and show."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from memlaw.cli.dispatch import DONE, INTERRUPTED, NOT_CERTIFIED
from memlaw.cli.terminal import duration, plain_table, print_json, print_rows, stdout_console

if TYPE_CHECKING:
    from memlaw.certify.certificate import Certificate
    from memlaw.cli.audit import AuditArguments
    from memlaw.cli.update import UpdateArguments
    from memlaw.cli.write import WriteArguments
    from memlaw.settings.audit import AuditConfig
    from memlaw.settings.update import UpdateConfig
    from memlaw.settings.write import WriteConfig
    from memlaw.shards.finishing import Shard

_SHOWN = 20  # shards; of more those that failed come first


def run_write(given: WriteArguments, config: WriteConfig) -> int:
    """`memlaw write --shards`; returns the exit status."""
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.shards.writing import ray_launcher, write_shards

    assert given.shards is not None
    launcher = None
    if given.launcher == "ray":
        launcher = ray_launcher(address=given.ray_address, cpus=given.ray_cpus, gpus=given.ray_gpus)
    with closing(ConsoleObserver()) as observer:
        try:
            result = write_shards(
                given.data,
                given.out,
                config,
                shards=given.shards,
                launcher=launcher,
                observer=observer,
            )
        except KeyboardInterrupt:
            observer.notice(
                f"Interrupted. Repeat it with --resume: what is finished is in {given.out}."
            )
            return INTERRUPTED
    show_shards(result.certificate, result.shards, result.out, result.wall_s)
    if not result.succeeded:
        stdout_console().print(
            "To continue with the shards that aren't, train longer (--resume --max-epochs N)."
        )
    return DONE if result.succeeded else NOT_CERTIFIED


def run_update(given: UpdateArguments, config: UpdateConfig) -> int:
    """`memlaw update` of a folder of shards; returns the exit status."""
    from memlaw.cli.diff import show_changes
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.cli.verdicts import show_forgotten
    from memlaw.shards.updating import update_shards

    with closing(ConsoleObserver()) as observer:
        try:
            result = update_shards(given.out, given.data, config, new=given.new, observer=observer)
        except KeyboardInterrupt:
            observer.notice(f"Interrupted. {given.out} is as it was; the same command begins anew.")
            return INTERRUPTED
    if result.changes.nothing and result.taken:
        stdout_console().print("No record changes. The shards' certificates are joined anew.")
    else:
        show_changes(result.changes)
    if result.changes.nothing and not result.taken:
        return DONE
    rows = {"trained": ", ".join(result.trained) or "no shard"}
    if result.dropped:
        rows["dropped, with all their records"] = ", ".join(result.dropped)
    print_rows(stdout_console(), rows)
    if result.forgotten:
        show_forgotten(result.forgotten)
    if result.certificate is None:
        said = f"REFUSED, at {result.trained[-1]}: {given.out} is as it was."
        stdout_console().print(said, soft_wrap=True)
        return NOT_CERTIFIED
    show_shards(result.certificate, result.shards, given.new or given.out, None)
    return DONE if result.certificate.certified else NOT_CERTIFIED


def show_shards(
    certificate: Certificate, shards: Mapping[str, Shard], out: Path, wall_s: float | None
) -> None:
    """A line a shard, the totals, and the verdict."""
    console = stdout_console()
    table = plain_table("", "records", "certified", "rank", "epochs", "ΔNLL")
    failed_first = sorted(shards, key=lambda name: shards[name].succeeded)
    for name in failed_first[:_SHOWN]:
        of, run = shards[name].certificate, shards[name].run
        harm = f"{of.damage['delta_nll_nats']:+.3f}"
        counts = (f"{of.n_records:,}", f"{of.n_certified:,}")
        table.add_row(name, *counts, f"{run['adapter']['rank']}", f"{run['epochs']}", harm)
    console.print(table)
    if len(shards) > _SHOWN:
        console.print(f"  and {len(shards) - _SHOWN} more")
    rows = {
        "certified": f"{certificate.n_certified:,} of {certificate.n_records:,}",
        "lowest p": f"{min(line.min_p for line in certificate.records):.3f}",
        "parameters": f"{certificate.n_parameters:,} in {len(shards)} adapters",
        "folder": str(out),
    }
    if wall_s is not None:
        rows["time"] = duration(wall_s)
    print_rows(console, rows)
    console.print(Text("CERTIFIED" if certificate.certified else "NOT CERTIFIED", style="bold"))
    if certificate.specific is not None:
        word = "SPECIFIC" if certificate.specific else "NOT SPECIFIC"
        console.print(Text(f"{word} (the worst of the adapters)", style="bold"))
        for reason in certificate.not_specific_because:
            console.print(Text(f"  {reason}"), soft_wrap=True)


def run_check(given: AuditArguments, config: AuditConfig) -> int:
    """`memlaw audit --certificate` of a folder of shards; returns the exit status."""
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.cli.verdicts import certificate_verdict
    from memlaw.core.errors import ConfigError
    from memlaw.shards.checking import check_shards

    assert given.certificate is not None
    if given.tokens is not None:
        raise ConfigError("--tokens is about one adapter, and these are shards: audit one of them.")
    with closing(ConsoleObserver()) as observer:
        check = check_shards(
            given.certificate.parent,
            given.data,
            config,
            certificate=given.certificate,
            observer=observer,
        )
    n = check.certificate.n_records
    if given.json:
        print_json(
            {
                "holds": check.holds,
                "n_recalled": check.n_recalled,
                "n_records": n,
                "mismatches": list(check.mismatches),
                "unchecked": list(check.unchecked),
            }
        )
    else:
        console = stdout_console()
        rows = {
            "shards": f"{len(check.checks)} of {len(check.certificate.adapters or {})} measured",
            "recited word for word": f"{check.n_recalled:,} of {n:,}",
        }
        print_rows(console, rows)
        unchecked = [f"not checked: {line}" for line in check.unchecked]
        for lines in (check.mismatches, unchecked):
            for line in lines[:_SHOWN]:
                console.print(Text(f"  {line}"), soft_wrap=True)
            if len(lines) > _SHOWN:
                console.print(f"  and {len(lines) - _SHOWN:,} more")
        console.print(Text(certificate_verdict(check), style="bold"))
    return DONE if check.holds else NOT_CERTIFIED
