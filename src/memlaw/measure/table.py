"""What an audit finds: a row for each token, a verdict on each record, and their totals.

Needs no torch: a report is made of these, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memlaw.core.criterion import SURE_Z, Criterion
from memlaw.core.intervals import share_interval


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """One row for each target token, record after record. All arrays have the same length N.

    Attributes:
        record: [N] int64: index of the record in the audit.
        position: [N] int64: index of the token in its target, from 0.
        token_id: [N] int64: the token that belongs there.
        nll_nats: [N] float32, ≥ 0: −ln p of it, given the prompt and the true tokens before it.
        argmax_id: [N] int64: the token that the model finds most probable there.
        margin_nats: [N] float32: the right token's logit less the highest of the others'; > 0 where
            the right token is the argmax.
        decoded_margin_nats: [N] float32: the same where greedy decoding came by; NaN where it was
            not run, or had said another token before.
    """

    record: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    nll_nats: np.ndarray
    argmax_id: np.ndarray
    margin_nats: np.ndarray
    decoded_margin_nats: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.token_id)

    @property
    def p(self) -> np.ndarray:
        """[N] float32 in [0, 1]: the probability of the right token."""
        return np.exp(-self.nll_nats)

    @property
    def correct(self) -> np.ndarray:
        """[N] bool: the right token is the argmax."""
        return self.argmax_id == self.token_id

    @property
    def rounding_nats(self) -> float | None:
        """The standard deviation of a margin over ways to compute it; None: nothing was decoded.

        The same token's margin is read in a whole sequence, and where decoding comes by, in other
        batches: two ways that agree but for rounding. From what they differ, in the root mean
        square over all tokens.
        """
        apart = (self.decoded_margin_nats - self.margin_nats).astype(np.float64)
        apart = apart[np.isfinite(apart)]
        return float(np.sqrt((apart**2).mean() / 2)) if apart.size else None

    @property
    def margin_z(self) -> np.ndarray:
        """[N] float64: the margin in standard deviations of rounding.

        The mean of the two margins, divided by the standard deviation that a third one has about
        it: so many of them a third way through the model would have to be off to say another token.
        Infinite where nothing is rounded; NaN where there is one margin only.
        """
        mean = (self.decoded_margin_nats + self.margin_nats).astype(np.float64) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return mean / ((self.rounding_nats or 0.0) * math.sqrt(1.5))

    @property
    def starts(self) -> np.ndarray:
        """[records + 1] int64: where each record's tokens start, and where the last ones end."""
        return np.append(np.flatnonzero(self.position == 0), len(self))


@dataclass(frozen=True, kw_only=True)
class RecordVerdict:
    """What was found of one record.

    Attributes:
        id: the record's id.
        sha256: hash of its prompt and completion; empty where that is not on record.
        n_tokens: target tokens, the end-of-turn token among them.
        min_p: the lowest probability of a target token.
        n_under: target tokens with p < threshold + margin.
        argmax_recalled: in the teacher-forced pass every target token is the argmax.
        decoded_recalled: greedy decoding gave exactly the target; None: it was not run.
        first_failure: position of the first target token that isn't the argmax; None if all are.
        cascade_tokens: positions of the target at which greedy decoding gave another token or none;
            None: it was not run.
        min_z: the lowest `TokenTable.margin_z` of a target token; None: it is not known.
        decoded_ids: the tokens that greedy decoding gave, at most as many as the target has; None:
            it was not run, or they are not on record.
    """

    id: str
    sha256: str
    n_tokens: int
    min_p: float
    n_under: int
    argmax_recalled: bool
    decoded_recalled: bool | None
    first_failure: int | None
    cascade_tokens: int | None
    min_z: float | None
    decoded_ids: tuple[int, ...] | None = field(repr=False)

    @property
    def certified(self) -> bool:
        """No token is under the line, and greedy decoding gave the same tokens."""
        return self.n_under == 0 and self.decoded_recalled is True

    @property
    def is_unsure(self) -> bool:
        """Recited, but by a margin that rounding may take: in other batches maybe not."""
        return self.recalled and self.min_z is not None and self.min_z < SURE_Z

    @property
    def passed(self) -> bool:
        """No measurement speaks against it: certified, if it was decoded."""
        return self.n_under == 0 and self.decoded_recalled is not False

    @property
    def recalled(self) -> bool:
        """Recited word for word: by decoding where that was run, else teacher-forced."""
        return self.argmax_recalled if self.decoded_recalled is None else self.decoded_recalled

    @property
    def disagrees(self) -> bool:
        """Teacher-forced pass and decoding differ: rounding decides, elsewhere maybe otherwise."""
        return self.decoded_recalled is not None and self.argmax_recalled != self.decoded_recalled


def verdicts(
    tokens: TokenTable, found: Sequence[Mapping[str, Any]], line: float
) -> tuple[RecordVerdict, ...]:
    """A verdict on each record: its tokens judged, the rest as it was found.

    Args:
        tokens: the token table, R records.
        found: for each of the R records `id`, `sha256`, `decoded_recalled`, `cascade_tokens` and
            `decoded_ids`; see `RecordVerdict`.
        line: the p that a certified token needs.
    """
    p, wrong, starts = tokens.p, ~tokens.correct, tokens.starts.tolist()
    z = tokens.margin_z
    judged = []
    for own, start, stop in zip(found, starts[:-1], starts[1:], strict=True):
        failures = np.flatnonzero(wrong[start:stop])
        min_z = float(z[start:stop].min())
        judged.append(
            RecordVerdict(
                n_tokens=stop - start,
                min_p=float(p[start:stop].min()),
                n_under=int((p[start:stop] < line).sum()),
                argmax_recalled=len(failures) == 0,
                first_failure=int(failures[0]) if len(failures) else None,
                min_z=None if math.isnan(min_z) else min_z,
                **own,
            )
        )
    return tuple(judged)


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """A verdict on each record, a row for each token, and totals.

    Attributes:
        records: verdicts, in the order of the records.
        tokens: the token table, in the same order.
        threshold, margin: a certified token has p ≥ threshold + margin.
        dtype: what the model computed in, as `bfloat16`; empty where that is not on record.
        batch_size: records per forward pass, at most; 0 where that is not on record.
        end: the end-of-turn token is asked for, too; without it a record's text alone counts.
        prefix_tokens: the records are documents, each asked for with so many tokens of its own;
            None: they have prompts.
    """

    records: tuple[RecordVerdict, ...]
    tokens: TokenTable = field(repr=False)
    threshold: float
    margin: float
    dtype: str
    batch_size: int
    end: bool = True
    prefix_tokens: int | None = None

    @property
    def criterion(self) -> Criterion:
        """What a certified token needs."""
        return Criterion(self.threshold, self.margin)

    @property
    def n_certified(self) -> int:
        """Number of records that are certified."""
        return sum(r.certified for r in self.records)

    @property
    def n_recalled(self) -> int:
        """Number of records that are recited word for word."""
        return sum(r.recalled for r in self.records)

    @property
    def share_recalled(self) -> tuple[float, float, float]:
        """Share of records that are recited word for word, and its 95 % interval (Wilson's)."""
        n = len(self.records)
        return (self.n_recalled / n, *share_interval(self.n_recalled, n))

    @property
    def n_decoded(self) -> int:
        """Number of records that greedy decoding was run on."""
        return sum(r.decoded_recalled is not None for r in self.records)

    @property
    def n_under(self) -> int:
        """Number of tokens with p < threshold + margin."""
        return sum(r.n_under for r in self.records)

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.n_certified == len(self.records)

    @property
    def passed(self) -> bool:
        """No measurement speaks against any record: certified, if all were decoded.

        Without `end`: every record is recited.
        """
        return all(r.passed if self.end else r.recalled for r in self.records)

    @property
    def unsure(self) -> tuple[RecordVerdict, ...]:
        """Records that are recited, but have a token with a `margin_z` under 3."""
        return tuple(r for r in self.records if r.is_unsure)

    @property
    def min_z(self) -> float | None:
        """The lowest of all records that are recited; None: it is not known."""
        known = [r.min_z for r in self.records if r.recalled and r.min_z is not None]
        return min(known, default=None)

    def sureness(self) -> dict[str, Any] | None:
        """How sure the records are, computed otherwise, as JSON; None: it is not known."""
        if (sd_nats := self.tokens.rounding_nats) is None:
            return None
        min_z = self.min_z
        is_finite = min_z is not None and math.isfinite(min_z)
        return {
            "sd_nats": sd_nats,
            "min_z": min_z if is_finite else None,
            "n_unsure": len(self.unsure),
        }

    @property
    def disagreements(self) -> tuple[RecordVerdict, ...]:
        """Records on which the teacher-forced pass and greedy decoding differ."""
        return tuple(r for r in self.records if r.disagrees)

    def token_rows(self, record: int) -> slice:
        """Where the tokens of a record, given by its index, stand in the table."""
        start, stop = np.searchsorted(self.tokens.record, [record, record + 1])
        return slice(int(start), int(stop))

    @property
    def nll_nats(self) -> float:
        """Mean negative log-likelihood, nats per target token."""
        return float(self.tokens.nll_nats.mean())

    @property
    def total_nll_bits(self) -> float:
        """Total negative log-likelihood of the targets, in bits."""
        return float(self.tokens.nll_nats.astype(np.float64).sum()) / math.log(2)
