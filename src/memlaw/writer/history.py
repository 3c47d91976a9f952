"""The generations of a folder: what each of them was, and going back to one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.files import RUN_FILE, read_json, write_json, writing
from memlaw.core.folders import (
    exchange,
    folder_beside,
    linked_tree,
    require_exchangeable,
    restore,
)
from memlaw.core.locks import locked
from memlaw.model.formats import adapter_sha256
from memlaw.writer.changes import finished_folder
from memlaw.writer.folder import (
    GENERATIONS,
    carry_over,
    others_files,
    require_no_part,
)


def log(out: str | Path) -> list[dict[str, Any]]:
    """What each generation of a folder was, the present one last.

    Args:
        out: a folder that `write` finished.

    Returns:
        The lines of `generations` in its `run.json`: records, rank, damage, seconds; each with
        `here`: `revert` can go back to it, or it is the present one.

    Raises:
        MemlawError: it is no finished run's folder.
    """
    out = Path(out)
    restore(out)
    lines = generations_of(finished_folder(out).run)
    last = len(lines)
    return [
        {**line, "here": line["number"] == last or _kept(out, line["number"]).is_dir()}
        for line in lines
    ]


def revert(out: str | Path, *, to: int) -> list[dict[str, Any]]:
    """Make a folder what it was: a new generation with an earlier one's files.

    The present one is kept, so that this can be undone, too. It is no forgetting: nothing is
    trained.

    Args:
        out: a folder that `update` has changed in place.
        to: number of the generation.

    Returns:
        As `log`, afterwards.

    Raises:
        ConfigError: there is no such generation, it is the present one, or it isn't kept.
        OutputError: another process is updating the folder.
    """
    restore(Path(out))
    finished_folder(Path(out))
    require_no_part(Path(out))
    require_exchangeable(Path(out))
    out = place = Path(out).resolve()  # a process that stands in it stands elsewhere then
    with locked(out):
        lines = generations_of(finished_folder(out).run)
        _check(out, lines, to)
        with folder_beside(place) as work:
            linked_tree(_kept(out, to), work, but=GENERATIONS)
            keep_generations(out, work, len(lines))
            carry_over(out, work)
            run = read_json(work / RUN_FILE, OutputError, "Fetch or make it again.")
            line = {**generations_of(run)[-1], "number": len(lines) + 1, "reverted_to": to}
            line |= dict.fromkeys(("wall_s", "training_s", "given_up_s", "once_s"))
            write_json(work / RUN_FILE, {**run, "generations": [*lines, line]})
            exchange(work, place)
    return log(out)


def _check(out: Path, lines: list[dict[str, Any]], to: int) -> None:
    if not 1 <= to <= len(lines):
        raise ConfigError(f"{out} has no generation {to}: there are 1 to {len(lines)}.")
    if to == len(lines):
        raise ConfigError(f"{out} is at generation {to} already.")
    if _kept(out, to).is_dir():
        _require_whole(_kept(out, to), lines[to - 1])
        return
    gone = [line["number"] for line in lines[to:] if line.get("removed")]
    why = (
        f"generation {gone[-1]} has removed records, and what recites them was dropped with it"
        if gone
        else "it was updated into another folder, or the folder was copied without it"
    )
    raise ConfigError(f"generation {to} of {out} isn't kept: {why}. 'memlaw log' shows what is.")


def _require_whole(kept: Path, line: Mapping[str, Any]) -> None:
    """Raise MemlawError where a generation isn't what it was."""
    run = finished_folder(kept).run
    found = None if "shards" in run else adapter_sha256(kept)
    if found is not None and found != line.get("adapter_sha256"):
        raise OutputError(f"{kept} holds another adapter than it did. Fetch that one again.")


def _kept(out: Path, number: int) -> Path:
    return out / GENERATIONS / str(number)


def keep_generations(out: Path, work: Path, number: int) -> None:
    """Take over what a folder is, and was, as earlier generations of its next one."""
    kept = work / GENERATIONS
    if (out / GENERATIONS).is_dir():
        linked_tree(out / GENERATIONS, kept, but="")
    with writing(kept):
        kept.mkdir(mode=0o700, exist_ok=True)
    others = [out / path for path in others_files(out)]
    linked_tree(
        out,
        kept / str(number),
        but=GENERATIONS,
        left=lambda folder: [path.name for path in others if path.parent == folder],
    )


def generations_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of `generations` in a `run.json`; of one that is older than them, what it says."""
    if "generations" in run:
        lines = [dict(line) for line in run["generations"]]
        if len(lines) == 1:
            lines[0] = {**_cost(run), **lines[0]}  # those of earlier versions don't say it
        return lines
    records, results = run.get("records", {}), run.get("results", {})
    damage = found if isinstance(found := results.get("damage"), dict) else {}
    return [
        {
            "number": 1,
            "created": None,
            "records": records.get("n"),
            "added": records.get("n"),
            "replaced": 0,
            "removed": 0,
            "unchanged": 0,
            "n_certified": results.get("n_certified"),
            "rank": run.get("adapter", {}).get("rank"),
            "epochs": run.get("epochs"),
            **_cost(run),
            "damage_nats": damage.get("delta_nll_nats"),
            "damage_ci95": damage.get("delta_nll_ci95"),
            "specific": run.get("specific"),
            "wall_s": run.get("timings", {}).get("wall_s"),
            "adapter_sha256": run.get("adapter", {}).get("sha256"),
        }
    ]


def _cost(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the line of a first generation says of its training; None: not on record."""
    try:
        flop = sum(float(epoch["flop"]) for epoch in run["curve"])
    except (KeyError, TypeError, ValueError, OverflowError):
        flop = None
    timings = run.get("timings")
    timings = timings if isinstance(timings, dict) else {}
    spent = {name: timings.get(name) for name in ("training_s", "given_up_s", "once_s")}
    return {"anew": True, "flop": flop, **spent}
