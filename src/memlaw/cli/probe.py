"""`memlaw probe`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from memlaw.cli.dispatch import DONE, INTERRUPTED, UNFORESEEN
from memlaw.cli.grid import delta_nll, grid_table, share_over
from memlaw.cli.parse import parse, part_of, split_lists
from memlaw.cli.terminal import duration, print_json, quiet_libraries, stdout_console
from memlaw.core.criterion import Criterion
from memlaw.settings.probe import ProbeConfig

if TYPE_CHECKING:
    from memlaw.probe.run import ProbeResult

GROUPS = {
    "data": ("out", "task"),
    "model": ("model", "layers", "device"),
    "grid": ("ranks", "lengths", "seeds"),
    "training": ("recipe", "steps", "objective"),
    "run": ("launcher", "json", "config"),
}


@dataclass(frozen=True, kw_only=True)
class ProbeArguments(ProbeConfig):
    """Train an adapter for each rank and length of a grid, and measure what it remembers.

    Attributes:
        out: folder of cells; cells that it holds already aren't run again.
        launcher: local runs one group of cells after the other; ray runs them as Ray tasks.
        ray_address: address of a Ray cluster (default: the one this machine belongs to, or a new
            one).
        ray_cpus: CPUs per Ray task.
        ray_gpus: GPUs per Ray task.
        json: print the cells as JSON.
        config: TOML file with options by these names; options on the command line win.
    """

    out: Annotated[Path, arg(aliases=["-o"])]
    launcher: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_cpus: float = 2
    ray_gpus: float = 0
    json: bool = False
    config: Path | None = None


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(ProbeArguments, GROUPS, "probe", split_lists(args))
    quiet_libraries()
    from memlaw.probe.run import probe

    result = probed(given, lambda config, how: probe(given.out, config, **how))
    if result is None:
        return INTERRUPTED
    if given.json:
        print_json(result.cells)
    else:
        show_probe(result, given.out)
    return UNFORESEEN if result.n_failed else DONE


def probed(given: ProbeArguments, run: Callable[[ProbeConfig, dict[str, Any]], Any]) -> Any:
    """What `run` makes of a probe's settings, and of launcher and observer; None if interrupted."""
    from memlaw.cli.progress import ConsoleObserver

    config = part_of(ProbeConfig, given)
    launcher = None
    if given.launcher == "ray":
        from memlaw.probe.ray_launcher import ray_launcher

        launcher = ray_launcher(address=given.ray_address, cpus=given.ray_cpus, gpus=given.ray_gpus)
    with closing(ConsoleObserver()) as observer:
        try:
            return run(config, {"launcher": launcher, "observer": observer})
        except KeyboardInterrupt:
            observer.notice(
                "Interrupted. The same command goes on with the cells that are missing."
            )
            return None


def show_probe(result: ProbeResult, out: Path) -> None:
    """The grid: how far the loss fell, and how many tokens are learnt."""
    console = stdout_console()
    done = [row for row in result.cells if row["status"] == "success"]
    ranks = sorted({row["rank"] for row in result.cells})
    lengths = sorted({row["length"] for row in result.cells})
    if done:
        n_seeds = len({row["seed"] for row in done})
        console.print(f"drop in loss, nats per token (mean of {n_seeds} seed(s); * saturated)")
        console.print(grid_table(done, ranks, lengths, delta_nll))
        console.print(
            f"share of tokens at p {Criterion().line:g} or more, teacher-forced (✓ all tokens of "
            "every seed)"
        )
        console.print(grid_table(done, ranks, lengths, share_over))
        worst = max(done, key=lambda row: row["damage_nll"])
        console.print(
            f"ΔNLL on unseen text: at most {worst['damage_nll']:+.3f} nats per token (length "
            f"{worst['length']}, rank {worst['rank']}, seed {worst['seed']})"
        )
    console.print(
        f"{len(done)} of {len(result.cells)} cells, {result.n_run} of them run now, in "
        f"{duration(result.wall_s)}: {out}"
    )
    if result.n_failed:
        console.print(
            f"{result.n_failed} FAILED; their files in {out}/cells say why. The same command "
            "tries them again."
        )
