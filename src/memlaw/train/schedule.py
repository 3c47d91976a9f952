"""The learning rate, as a share of the highest one."""

from __future__ import annotations

from memlaw.settings.train import TrainConfig

_LEAST_SHARE = 0.1


class Schedule:
    """How the learning rate falls; see `TrainConfig.schedule`.

    Args:
        config: how to train.
        least: the share that it doesn't fall under.

    Attributes:
        share: for the current epoch, by the last one's loss; in [least, 1].
    """

    def __init__(self, config: TrainConfig, least: float = _LEAST_SHARE) -> None:
        self.config, self.least = config, least
        self.share = 1.0

    def after_epoch(self, nll_nats: float) -> None:
        """Set the share by an epoch's mean loss in nats, if the schedule goes by the loss."""
        if self.config.schedule == "loss":
            self.share = min(1.0, max(self.least, nll_nats**0.5))

    def at(self, n_looks: int) -> float:
        """The share at a step, `n_looks` batches having been seen before it."""
        if self.config.total_steps is None:
            return self.share
        return self.share * max(0.0, 1 - n_looks / self.config.total_steps)
