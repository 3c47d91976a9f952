"""What `write` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from memlaw.certify.certificate import Certificate
from memlaw.measure.damage import Damage
from memlaw.measure.examine import Audit
from memlaw.measure.harm import Harm
from memlaw.measure.specificity import Specificity, specificity
from memlaw.train.speed import Speed


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """What `write` made.

    Attributes:
        out: the folder.
        certificate: what was found.
        audit: the verdicts and the token table.
        harms: what was measured of each kind of harm, by name.
        bounds: of the kinds of harm that are to be bounded, the most that `high` may be.
        forms: the audit in each form of `robust_to`, by name.
        rank: the adapter's.
        n_parameters: trained numbers.
        bits_stored: by how many bits the records' total NLL fell.
        epochs: epochs trained.
        n_left_out: records that the last of them left out: too far from complete for the time
            that was left.
        wall_s: seconds, model loading and audit included.
        once_s: those of them that went into what is kept of the base model for later runs.
        speed: of the training alone; None if no epoch was trained.
        stopped_because: why training ended.
    """

    out: Path
    certificate: Certificate
    audit: Audit = field(repr=False)
    harms: dict[str, Harm]
    bounds: dict[str, float]
    forms: dict[str, Audit] = field(default_factory=dict, repr=False)
    rank: int
    n_parameters: int
    bits_stored: float
    epochs: int
    n_left_out: int
    wall_s: float
    once_s: float
    speed: Speed | None
    stopped_because: str

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.certificate.certified

    @property
    def damage(self) -> Damage:
        """Change on unseen text."""
        return self.harms["damage"]  # type: ignore[return-value]

    @property
    def max_damage(self) -> float | None:
        """The bound on damage that was asked for, in nats per token; None if none was."""
        return self.bounds.get("damage")

    @property
    def specificity(self) -> Specificity | None:
        """Whether other prompts are answered as before; None: they were not measured."""
        return specificity(self.harms)

    @property
    def above_bounds(self) -> tuple[str, ...]:
        """The kinds of harm whose 95 % interval isn't below the bound that was asked for."""
        return tuple(  # not a number is not below it either
            name for name, bound in self.bounds.items() if not self.harms[name].high <= bound
        )

    @property
    def within_bounds(self) -> bool | None:
        """Every bound that was asked for is kept; None if none was."""
        return not self.above_bounds if self.bounds else None

    @property
    def harmless(self) -> bool:
        """`within_bounds`, but True where no bound was asked for: the older name says too much."""
        return not self.above_bounds

    @property
    def not_robust_to(self) -> tuple[str, ...]:
        """The forms that were asked for in which not every record is certified."""
        return tuple(name for name, audit in self.forms.items() if not audit.certified)

    @property
    def succeeded(self) -> bool:
        """Certified, in the forms that were asked for, too, and within the bounds likewise."""
        return self.certified and not self.above_bounds and not self.not_robust_to

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each trained number."""
        return self.bits_stored / self.n_parameters
