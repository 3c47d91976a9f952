"""What an audit finds: a row for each token, a verdict on each record, and their totals.

Needs no torch: a report is made of these, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memlaw.core.criterion import MOST_FLIPS, Criterion
from memlaw.core.intervals import share_interval

# Degrees of freedom of the distribution that the tokens' variances have: by their kurtosis,
# differences of two margins are t with 7 to 11, in six adapters in bfloat16 (LOG.md, 2026-11-28).
_PRIOR_DF = 8


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
        square over all tokens that decoding came by (not those that it flipped: a little too low
        where there are many).
        """
        apart = (self.decoded_margin_nats - self.margin_nats).astype(np.float64)
        apart = apart[np.isfinite(apart)]
        return float(np.sqrt((apart**2).mean() / 2)) if apart.size else None

    @property
    def flip_risk(self) -> np.ndarray:
        """[N] float64 in [0, 1]: the chance that rounded otherwise another token is the argmax.

        The mean of the two margins against what a third one differs from it, by a moderated t-test
        (Smyth 2004): a token's variance is its own, from one difference, drawn to that of all. 0
        where nothing is rounded; NaN where there is one margin only.
        """
        from scipy.special import stdtr

        read, decoded = (m.astype(np.float64) for m in (self.margin_nats, self.decoded_margin_nats))
        mean = (self.rounding_nats or 0.0) ** 2  # of the variances: (df - 2) / df is their scale
        variance = ((_PRIOR_DF - 2) * mean + (decoded - read) ** 2 / 2) / (_PRIOR_DF + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (read + decoded) / 2 / np.sqrt(1.5 * variance)
        return np.asarray(stdtr(_PRIOR_DF + 1, -t))

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
        flip_risk: the chance that rounded otherwise, in other batches, it isn't recited, for this
            model's rounding (see `TokenTable`); None: not known, or it isn't recited here.
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
    flip_risk: float | None
    decoded_ids: tuple[int, ...] | None = field(repr=False)

    @property
    def certified(self) -> bool:
        """No token is under the line, and greedy decoding gave the same tokens."""
        return self.n_under == 0 and self.decoded_recalled is True

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
    risk = tokens.flip_risk
    judged = []
    for own, start, stop in zip(found, starts[:-1], starts[1:], strict=True):
        failures = np.flatnonzero(wrong[start:stop])
        flips = 1 - float(np.prod(1 - risk[start:stop]))
        judged.append(
            RecordVerdict(
                n_tokens=stop - start,
                min_p=float(p[start:stop].min()),
                n_under=int((p[start:stop] < line).sum()),
                argmax_recalled=len(failures) == 0,
                first_failure=int(failures[0]) if len(failures) else None,
                flip_risk=None if math.isnan(flips) else flips,
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
    def flips_per_1000(self) -> float | None:
        """Of a thousand answers, how many other batches are expected to give otherwise.

        Of those records that are recited here. None: it is not known.
        """
        known = [r.flip_risk for r in self.records if r.flip_risk is not None]
        return 1000 * sum(known) / len(known) if known else None

    @property
    def unsure(self) -> tuple[int, ...]:
        """Indices of the records that have to be surer of their answers in other batches.

        None while of a thousand answers at most one is expected to be another there; else those
        that are most likely to be, so many that the rest keeps to half of that.
        """
        known = {n: r.flip_risk for n, r in enumerate(self.records) if r.flip_risk is not None}
        most, left, found = MOST_FLIPS * len(known), sum(known.values()), []
        if left <= most:
            return ()
        for n in sorted(known, key=lambda n: -known[n]):
            if left <= most / 2:
                break
            left -= known[n]
            found.append(n)
        return tuple(sorted(found))

    def rounding(self) -> dict[str, Any] | None:
        """What rounding moves, and may take, as JSON; None: it is not known."""
        if (flips := self.flips_per_1000) is None:
            return None
        return {"sd_nats": self.tokens.rounding_nats, "flips_per_1000": flips}

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
