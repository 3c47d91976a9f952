"""What holds a learner's model to its base beside the records, and the mean of its weights.

Shapes: M target positions of the held examples of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.model.adapter import Adapter
from memlaw.settings.recipe import Recipe
from memlaw.train.retention import Term, quadratic_penalty

Weights = list[Tensor]  # of an adapter, in the order of its parameters


def row_means(values: Float32[Tensor, "M"], lengths: Sequence[int]) -> list[float]:
    """The mean of each part of some values: on a GPU they are waited for once, not one by one."""
    parts = values.detach().cpu().split(list(lengths))
    return [float(part.mean()) for part in parts]


class Holding:
    """The negatives of a learner: which of them a step sees, and what they count in it.

    A negative is an example that is held to what the bare model makes of it. Near misses are held
    at the first position of the answer, conversations at each of them.

    Args:
        recipe: the constants.
        near: rows of the near misses among the engine's examples.
        chats: rows of the conversations.
        lengths: target tokens of each of these rows.
        n_records: how many records there are; their rows come first.
        closed: the quadratic form of all near misses, in the coordinates that A is trained in; None
            if there are no near misses.
        seed: of what is drawn.

    Attributes:
        active: negatives are part of the training: the loss was under `recipe.start_nats` once.
        push: what retention and negatives are multiplied by.
        extra: how long training goes on once all records were over the line, as a share of its
            epochs.
        least_push, most_push: how far `push` may fall and rise; from 1 to `recipe.most_push`.
        last_kl: [negatives] nats, of each when it was last seen; 1 before.
        mean: the running mean of the weights since the training became active.
        kept: the last of these with which all records were well over the line.
        kept_push: the `push` that it was trained under; None where none was kept.
        focus: [target tokens of all records] ≥ 1: what each counts beyond what the objective gives
            it; None before the first look.
        failed: [records] how often each failed an audit that nearly all passed.
        patience: looks that may still find a few records that aren't safe before `push` falls.
        first_over: the epoch in which all records first were over the line in the mean; 0 before.
        last_kept: that of `kept`; 0 where there is none.
        looked: the epoch in which the mean was last audited.
        gate: the rank of the adapter that the gate sits in, once it was put in.
        is_warm: it goes on where an earlier training ended.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        near: Sequence[int],
        chats: Sequence[int],
        lengths: Sequence[int],
        n_records: int,
        closed: Term | None,
        seed: int,
    ) -> None:
        self.recipe, self.seed = recipe, seed
        n = recipe.retention_parts
        self.closed = [closed.part(i, n) for i in range(n)] if closed else []
        self.rows = [*near, *chats]
        self.n_near = len(near)
        self.lengths = dict(zip(self.rows, lengths, strict=True))
        self.place = {row: i for i, row in enumerate(self.rows)}
        self.active, self.is_warm, self.extra = False, False, recipe.extra
        self.push, self.least_push, self.most_push = 1.0, 1.0, recipe.most_push
        self.last_kl = torch.ones(len(self.rows))
        self.mean: Weights | None = None
        self.kept: Weights | None = None
        self.kept_push: float | None = None
        self.focus: Tensor | None = None
        self.failed, self.patience = torch.zeros(n_records), 0
        self.first_over = self.last_kept = self.looked = 0
        self.gate: int | None = None
        self._aside: Weights | None = None  # weights in training, while others are shown

    # ------------------------------------------------------------ a step

    def draw(self, step: int) -> list[int]:
        """The rows that a step holds: as likely as their KL was high when they were last seen."""
        if not self.active:
            return []
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        chosen = []
        for start, end, n in (
            (0, self.n_near, self.recipe.near_per_step),
            (self.n_near, len(self.rows), self.recipe.chats_per_step),
        ):
            if n := min(n, end - start):
                weights = self.last_kl[start:end].clamp(min=0) + self.recipe.least_kl
                drawn = torch.multinomial(weights, n, generator=generator)
                chosen += [self.rows[start + i] for i in drawn.tolist()]
        return chosen

    def weigh(self, rows: Sequence[int], kl: Float32[Tensor, "M"]) -> Float32[Tensor, "M"]:
        """What the KL at each position counts in the step that has drawn `rows`."""
        weights = torch.zeros_like(kl)
        parts = weights.split([self.lengths[row] for row in rows])
        is_near = [self.place[row] < self.n_near for row in rows]
        for kind, weight in ((True, self.recipe.near), (False, self.recipe.chat)):
            alike = [part for part, near in zip(parts, is_near, strict=True) if near == kind]
            n = sum(len(part) for part in alike)
            for part in alike:
                part.fill_(self.push * weight / n)
        for row, found in zip(rows, row_means(kl, [len(p) for p in parts]), strict=True):
            self.last_kl[self.place[row]] = found if found == found else 1.0  # not NaN
        return weights

    def penalty(self, adapter: Adapter, step: int) -> Float32[Tensor, ""]:
        """The weighted form of near misses, a part of them a step; a scalar with a graph."""
        if not (self.closed and self.active):
            return 0 * adapter.a[0].sum()
        factors = list(zip(adapter.a, adapter.b, strict=True))
        part = self.closed[step % len(self.closed)]
        return self.push * self.recipe.closed * quadratic_penalty([part], factors)

    @torch.no_grad()
    def after_step(self, adapter: Adapter, n_batches: int) -> None:
        """Take the weights into the mean.

        Args:
            adapter: whose weights.
            n_batches: how many steps the epoch has. In an update that trains few records they are
                few, and the mean follows each the more: as quickly, in epochs, as in a `write`.
        """
        if self.mean is None and self.active:
            self.mean = _copy(adapter)
        elif self.mean is not None:
            left = self.recipe.mean
            if self.is_warm:
                left **= max(1.0, self.recipe.steps / n_batches)
            for mean, weights in zip(self.mean, adapter.parameters(), strict=True):
                mean.lerp_(weights, 1 - left)

    def after_epoch(self, nll_nats: float) -> None:
        """Let negatives join once the loss is low enough."""
        self.active = self.active or nll_nats < self.recipe.start_nats

    def after_growth(self) -> None:
        """The adapter has another rank: the mean begins anew."""
        self.mean = None

    def start_warm(self, adapter: Adapter, gate: int | None, push: float | None) -> None:
        """Begin where an earlier training ended.

        Args:
            adapter: its mean.
            gate: the rank of its gate, if it has one.
            push: what it was trained under at last; None: nobody knows.
        """
        self.active, self.is_warm, self.gate = True, True, gate
        if push is not None:
            self.push, self.extra = min(self.most_push, push), self.recipe.extra_warm
            self.least_push = min(self.least_push, self.push)
        self.begin_mean(adapter)

    def begin_mean(self, adapter: Adapter) -> None:
        """Let the mean begin with the weights as they are."""
        self.mean = _copy(adapter)

    # ------------------------------------------------------------ the mean, looked at

    def is_due(self, epoch: int, share_under: float) -> bool:
        """Whether the mean is worth an audit, `share_under` of the records not being there yet."""
        waited = epoch - self.looked >= self.recipe.look_epochs
        near_there = share_under < self.recipe.look_share or self.first_over > 0
        return self.mean is not None and waited and near_there

    def after_look(self, epoch: int, share_safe: float, share_over: float) -> None:
        """Keep the mean and hold tighter while all records are safe, looser when too many aren't.

        Where all were over the line once and nothing is kept, one that isn't safe is too many, but
        not for the first few looks after an audit that only a few failed.

        Args:
            epoch: the current one.
            share_safe: of the records, those so far over the line that the mean may be kept.
            share_over: those that are over it at all.
        """
        self.looked = epoch
        if share_over == 1:
            self.first_over = self.first_over or epoch
        if share_safe == 1:
            self.keep(epoch)
            self.push = min(self.most_push, self.push * self.recipe.tighter)
        elif self.patience and self._are_few((1 - share_safe) * len(self.failed)):
            self.patience -= 1
        elif share_safe < self.recipe.enough or (self.first_over and self.kept is None):
            self.push = max(self.least_push, self.push / self.recipe.looser)

    def keep(self, epoch: int) -> None:
        """Keep the mean as it is in this epoch."""
        assert self.mean is not None
        self.kept, self.last_kept = [weights.clone() for weights in self.mean], epoch
        self.kept_push, self.patience = self.push, 0

    def focus_on(self, odds: Float32[Tensor, "N"]) -> None:
        """Let tokens that the mean leaves near the line count twice as much from look to look.

        What is left of them are a few that all others wait for: only when they pass, too, `push`
        may rise. A token that is well over the line goes back to 1 by and by.

        Args:
            odds: of each target token, the log-odds of p above those of the line.
        """
        before = torch.ones_like(odds) if self.focus is None else self.focus
        near, far = self.recipe.stubborn
        factor = torch.where(odds < near, 2.0, torch.where(odds > far, 0.5, 1.0))
        self.focus = (before * factor).clamp(1.0, self.recipe.most_focus)

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: less, once all records were over the line."""
        return self.recipe.last_rate if self.first_over else 1.0

    def hold_looser(self) -> None:
        """Nothing improves: the records come first."""
        self.least_push /= 4
        self.push = self.least_push

    def forget_kept(self) -> None:
        """What passed here failed the audit of the saved folder: hold as loosely as before it."""
        self._drop_kept()
        self.push = max(self.least_push, self.push / self.recipe.tighter)

    def mend(self, rows: Sequence[int], *, of_any_number: bool = False) -> bool:
        """The same, if so few records failed that it is enough to ask more of these alone.

        The hold goes back no further than to what all others passed under.

        Args:
            rows: the records that failed.
            of_any_number: ask it of them, even if they are more than a few.

        Returns:
            Whether that is so. A record that failed again and again is a matter of all.
        """
        if not of_any_number and not self._are_few(len(rows)):
            return False
        rows = list(rows)
        if self.failed[rows].max() >= self.recipe.most_mended:
            return False
        self.push = self.kept_push or self.push
        self._drop_kept()
        self.failed[rows] += 1
        self.patience = self.recipe.patience
        return True

    def _drop_kept(self) -> None:
        self.kept, self.kept_push, self.last_kept, self.patience = None, None, 0, 0

    def _are_few(self, n: float) -> bool:
        """Whether n records are some, but no more than a few, of all; one always is."""
        return 0 < n < max(1.0, self.recipe.few * len(self.failed)) + 0.5

    @property
    def last_epoch(self) -> int:
        """The epoch after which training may end, once something was kept."""
        return self._after_all_over(self.extra)

    @property
    def late_epoch(self) -> int:
        """The epoch after which less than well over the line is enough, if nothing was kept."""
        return self._after_all_over(self.recipe.extra)

    def _after_all_over(self, extra: float) -> int:
        share = -(-self.first_over * round(100 * (1 + extra)) // 100)
        looks = self.first_over + 2 * self.recipe.look_epochs  # a few, whatever the share
        return max(share, looks) if self.first_over else 0

    def start_from(self, adapter: Adapter, weights: Weights) -> None:
        """Go on training from other weights."""
        self.hide(adapter)
        _put(adapter, weights)

    # ------------------------------------------------------------ showing other weights

    @torch.no_grad()
    def show(self, adapter: Adapter, weights: Weights) -> None:
        """Give the adapter other weights; `hide` brings those in training back."""
        if self._aside is None:
            self._aside = _copy(adapter)
        _put(adapter, weights)

    @torch.no_grad()
    def hide(self, adapter: Adapter) -> None:
        """Go back to the weights in training."""
        if self._aside is not None:
            _put(adapter, self._aside)
            self._aside = None

    # ------------------------------------------------------------ its state

    def in_training(self, adapter: Adapter) -> Mapping[str, Tensor]:
        """The adapter's weights in training by name, whatever is shown."""
        found = adapter.state_dict()
        if self._aside is None:
            return found
        names = [name for name, _ in adapter.named_parameters()]
        return {**found, **dict(zip(names, self._aside, strict=True))}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, not copied, and JSON-able values."""
        tensors = {"last_kl": self.last_kl, "failed": self.failed}
        if self.focus is not None:
            tensors["focus"] = self.focus
        for name, weights in (("mean", self.mean), ("kept", self.kept)):
            tensors |= {f"{name}.{i}": w for i, w in enumerate(weights or ())}
        values = {
            name: getattr(self, name)
            for name in (
                *("active", "push", "least_push", "most_push", "patience"),
                *("first_over", "last_kept", "looked", "gate", "kept_push", "extra"),
            )
        }
        return tensors, values

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        device: torch.device | str = "cpu",
    ) -> None:
        """Go back to what `state` returned; what the adapter shows is forgotten.

        Args:
            tensors, values: as `state` gave them; from a file the tensors are on the CPU.
            device: the adapter's, where the weights are wanted.
        """
        for name, value in values.items():
            setattr(self, name, value)
        self.last_kl, self._aside = tensors["last_kl"].clone(), None
        self.failed = tensors["failed"].clone()
        self.focus = tensors["focus"].clone() if "focus" in tensors else None
        self.mean, self.kept = (_listed(tensors, name, device) for name in ("mean", "kept"))


def _copy(adapter: Adapter) -> Weights:
    return [weights.detach().clone() for weights in adapter.parameters()]


@torch.no_grad()
def _put(adapter: Adapter, weights: Weights) -> None:
    for at, value in zip(adapter.parameters(), weights, strict=True):
        at.copy_(value)


def _listed(tensors: Mapping[str, Tensor], name: str, device: torch.device | str) -> Weights | None:
    n = sum(key.startswith(f"{name}.") for key in tensors)
    return [tensors[f"{name}.{i}"].to(device, copy=True) for i in range(n)] or None
