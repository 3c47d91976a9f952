"""What `write` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from memlaw.certify.certificate import Certificate
from memlaw.measure.damage import Damage
from memlaw.measure.examine import Audit
from memlaw.train.speed import Speed


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """What `write` made.

    Attributes:
        out: the folder.
        certificate: what was found.
        audit: the verdicts and the token table.
        damage: change on unseen text.
        max_damage: the bound that was asked for, in nats per token; None if none was.
        rank: the adapter's.
        n_parameters: trained numbers.
        bits_stored: by how many bits the records' total NLL fell.
        epochs: epochs trained.
        n_left_out: records that the last of them left out: too far from complete for the time
            that was left.
        wall_s: seconds, model loading and audit included.
        speed: of the training alone; None if no epoch was trained.
        stopped_because: why training ended.
    """

    out: Path
    certificate: Certificate
    audit: Audit = field(repr=False)
    damage: Damage
    max_damage: float | None
    rank: int
    n_parameters: int
    bits_stored: float
    epochs: int
    n_left_out: int
    wall_s: float
    speed: Speed | None
    stopped_because: str

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.certificate.certified

    @property
    def within_damage_bound(self) -> bool | None:
        """The 95 % interval of the damage lies under the bound; None if no bound was asked for."""
        return None if self.max_damage is None else self.damage.high <= self.max_damage

    @property
    def harmless(self) -> bool:
        """`within_damage_bound`, but True without a bound: the older name, which says too much."""
        return self.within_damage_bound is not False

    @property
    def succeeded(self) -> bool:
        """Certified, and within the bound on damage if one was asked for."""
        return self.certified and self.within_damage_bound is not False

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each trained number."""
        return self.bits_stored / self.n_parameters
