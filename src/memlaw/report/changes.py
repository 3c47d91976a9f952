"""What else an adapter changed: tables of other prompts and texts, answers before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from memlaw.core.intervals import share_interval
from memlaw.report.run_view import RunView, damage_of, other_harms
from memlaw.report.tables import Table, shortened, signed

# Kinds of harm that have tables here.
KNOWN = ("prose", "chats", "elsewhere", "near_misses", "generality")
_SHOWN = 8
_EXCERPT = 160
_NEAR = {
    "recombined": "of them, words of several records",
    "unknown": "of them, words of no record",
    "given": "of them, prompts that were given",
    "dropped": "not counted: a record's prompt, a word dropped",
    "swapped": "not counted: a record's prompt, two words swapped",
    "misspelt": "not counted: a record's prompt, misspelt",
    "case": "not counted: a record's prompt, in another case",
}


def changes_tables(view: RunView) -> list[Table]:
    """All of them; none where other prompts were not asked."""
    harms = other_harms(view)
    if "elsewhere" not in harms or "near_misses" not in harms:
        return []
    found = [
        _prompts(harms["elsewhere"], harms["near_misses"]),
        _texts(view, harms),
        _answers(view, "elsewhere", "changed", "Answers that changed most", "KL"),
        _answers(
            view,
            "near_misses",
            "answered",
            "Near misses answered like a record",
            "what it is",
        ),
    ]
    return [table for table in found if table is not None]


def generality_tables(view: RunView) -> list[Table]:
    """What came when records were asked for in words that training never saw; none: not asked."""
    harm = other_harms(view).get("generality")
    if harm is None:
        return []
    counted = Table(
        name="generality",
        title="Asked in other words",
        head=("asked", "found", "share", "95 % from", "to"),
        rows=[_counted("held-out phrasings: recited", harm["recited"], harm["n"])],
    )
    missed = _answers(
        view, "generality", "missed", "Asked in other words, and not recited", "what it is"
    )
    return [
        counted,
        *([replace(missed, head=("prompt", "stored", "answer", ""))] if missed else []),
    ]


def changes_text(view: RunView) -> str:
    """What was asked, in words."""
    harm = other_harms(view)["elsewhere"]
    return (
        f"The adapted model was asked {harm['n']:,} prompts that have nothing to do with the "
        f"records ({harm['n_everyday']:,} everyday questions, the rest written by the base model "
        "itself), and near misses: prompts like the records' for which nothing is stored. An "
        "answer is as before if greedy decoding gives the base model's word for word, 32 tokens; "
        "rounding alone changes some, so that shares are of what it leaves."
    )


def _prompts(elsewhere: Mapping[str, Any], near: Mapping[str, Any]) -> Table:
    asked = elsewhere["n_everyday"]
    rows = [
        (
            "other prompts: answered as before, of what rounding leaves",
            f"{elsewhere['unchanged']:,} of {elsewhere['floor']:,}",
            *_shares(elsewhere["share_of_floor"], elsewhere["share_of_floor_ci95"]),
        ),
        _counted(
            "everyday questions: answered like a record", elsewhere["everyday_in_form"], asked
        ),
        _counted("near misses: a stored answer", near["leaks"], near["n"]),
        _counted("near misses: an answer made up", near["made_up"], near["n"]),
        *(
            _counted(_NEAR.get(kind, kind), counts["made_up"], counts["n"])
            for kind, counts in near["by_kind"].items()
        ),
    ]
    return Table(
        name="prompts",
        title="Other prompts",
        head=("asked", "found", "share", "95 % from", "to"),
        rows=rows,
    )


def _counted(what: str, found: int, n: int) -> tuple[str, ...]:
    return (
        what,
        f"{found:,} of {n:,}",
        *_shares(found / n if n else 0.0, share_interval(found, n)),
    )


def _shares(share: float, interval: Any) -> Iterator[str]:
    return (f"{value:.1%}" for value in (share, *interval))


def damage_by_domain(view: RunView) -> dict[str, Mapping[str, Any]]:
    """Damage on each kind of text that it was measured on, the worst first."""
    harms = other_harms(view)
    found = {
        "unseen text": damage_of(view),
        "prose": harms.get("prose"),
        "chats": harms.get("chats"),
    }
    known = [(name, damage) for name, damage in found.items() if damage]
    return dict(sorted(known, key=lambda item: -item[1]["delta_nll_nats"]))


def _texts(view: RunView, harms: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            name,
            *map(signed, (found["delta_nll_nats"], *found["delta_nll_ci95"], found["kl_nats"])),
        )
        for name, found in damage_by_domain(view).items()
    ]
    rows.append(("other prompts' answers", "–", "–", "–", signed(harms["elsewhere"]["kl_nats"])))
    return Table(
        name="domains",
        title="Other texts, nats a token",
        head=("text", "ΔNLL", "95 % from", "to", "KL"),
        rows=rows,
    )


def _answers(view: RunView, key: str, name: str, title: str, last: str) -> Table | None:
    found = (view.answers or {}).get(key)
    if not found:
        return None
    rows = [
        (
            shortened(one["prompt"], _EXCERPT),
            shortened(one["before"], _EXCERPT) or "(nothing)",
            shortened(one["after"], _EXCERPT) or "(nothing)",
            one["kind"] if one["kl_nats"] is None else signed(one["kl_nats"], 2),
        )
        for one in found[:_SHOWN]
    ]
    return Table(
        name=name,
        title=title,
        head=("prompt", "before", "after", last),
        rows=rows,
    )
