"""A certificate that says more than was measured.

Whoever gives an adapter away can write into certificate.json whatever looks right, hashes
included: nothing in it is signed. So nothing in it may be believed; `audit --certificate`
measures all of it. Tried: an adapter that recites some of its records is said to recite all, with
totals and hashes that agree; a line so low that everything is over it; more records than there
are; no harm.
"""

from pathlib import Path
from typing import Any

from common import checked, copied, edited, refused, require


def attempt(place: Path) -> str:
    """Forge, and have it measured."""
    folder = copied(place, "unfinished")

    def all_are_certified(content: dict[str, Any]) -> None:
        for line in content["records"]:
            line |= {"certified": True, "recalled": True, "min_p": 0.99}
        content |= {"certified": True, "n_certified": len(content["records"])}

    edited(folder / "certificate.json", all_are_certified)
    found = checked(folder)
    require(not found.holds, "an adapter that doesn't recite its records passed as certified")
    said = found.mismatches[0]
    finished = copied(place)
    edited(finished / "certificate.json", lambda content: content.update(threshold=-1.0))
    refused(lambda: checked(finished))
    edited(finished / "certificate.json", lambda content: content.update(threshold=0.5, margin=-3))
    refused(lambda: checked(finished))

    def harmless(content: dict[str, Any]) -> None:
        content["margin"] = 0.05
        content["damage"] |= {"delta_nll_nats": -1.0, "delta_nll_ci95": [-1.1, -0.9]}

    edited(finished / "certificate.json", harmless)
    require(not checked(finished).holds, "harm that is made up passed")
    return said
