"""The rows of a data set that can't be used: collected, then refused in one message or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memlaw.core.errors import DataError

_SHOWN = 10  # how many rows a message lists


class BadRows:
    """Rows that can't be used, each with the reason.

    Attributes:
        reasons: by the row's id, what is wrong with it and the mend, in one sentence or two.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._n_told = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def copy(self) -> BadRows:
        """The same rows, none of them told yet."""
        other = BadRows()
        other.reasons |= self.reasons
        return other

    def add(self, row: str, error: DataError) -> None:
        """Note one row; the error's message may begin with its id."""
        self.reasons[row] = str(error).removeprefix(f"{row}: ")

    def settle(self, n_good: int, *, skip: bool, notice: Callable[[str], None]) -> None:
        """Say what was left out, or refuse the data.

        Args:
            n_good: how many rows are left.
            skip: leave bad rows out, if any good one is left.
            notice: called with the list of what was left out, if anything was, and more than when
                it was called last.

        Raises:
            DataError: there are bad rows, and they aren't to be left out. Lists the first ten.
        """
        if skip and n_good and self.reasons:
            if len(self) == self._n_told:
                return
            self._n_told = len(self)
            notice(f"{len(self)} bad row(s) left out:\n" + "\n".join(self._listed()))
        elif self.reasons:
            mend = "\nCorrect them, or leave them out with --skip-bad (write, update, audit)."
            row, reason = next(iter(self.reasons.items()))
            if len(self) == 1:
                mend = " Or leave the row out with --skip-bad (write, update, audit)."
                raise DataError(f"{row}: {reason}" + (mend if n_good else ""))
            if not n_good and len(set(self.reasons.values())) == 1:
                raise DataError(f"{row}: {reason} The same holds for all {len(self)} rows.")
            lines = "\n".join(self._listed())
            raise DataError(f"{len(self)} bad rows:\n{lines}" + (mend if n_good else ""))

    def _listed(self) -> Iterator[str]:
        for row, reason in list(self.reasons.items())[:_SHOWN]:
            yield f"  {row}: {reason}"
        if len(self) > _SHOWN:
            yield f"  and {len(self) - _SHOWN} more"
