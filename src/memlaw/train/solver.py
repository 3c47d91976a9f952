"""What moves the weights: a solver, and its state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from memlaw.model.adapter import Adapter
from memlaw.settings.train import TrainConfig

Tensor = torch.Tensor
_KEYS = ["step", "exp_avg", "exp_avg_sq"]  # of a parameter's state in PyTorch's AdamW
_HIGHEST = "max_exp_avg_sq"  # likewise, with AMSGrad


class Solver:
    """AdamW on an adapter's weights, gradients clipped to a norm.

    Args:
        adapter: what is trained; its `grad`s are read.
        config: learning rate, betas, norm.
        amsgrad: second moments never fall (AMSGrad, https://arxiv.org/abs/1904.09237), so that
            steps don't get larger as gradients get smaller.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig, *, amsgrad: bool = False) -> None:
        self.adapter, self.config, self.amsgrad = adapter, config, amsgrad
        self.optimizer = torch.optim.AdamW(
            adapter.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=0.0,
            amsgrad=amsgrad,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def clip(self) -> bool:
        """Clip the gradients to the norm; returns whether they are finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        return bool(torch.isfinite(norm))

    def step(self, rate_share: float) -> None:
        """Move the weights, at a share of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_share
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, besides weights and gradients; not copied."""
        return {
            f"{key}.{i}": self.optimizer.state[parameter][key]
            for i, parameter in enumerate(self.adapter.parameters())
            for key in self.optimizer.state.get(parameter, {})
        }

    def memory(self) -> dict[str, Tensor]:
        """What of its state another training may start with: not how large gradients have been."""
        return {k: v for k, v in self.state().items() if not k.startswith(_HIGHEST)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state()` returned, of a solver of the same sizes or smaller ones.

        Where the adapter has grown, what is new starts without a memory; and so does what doesn't
        fit. A state without highest second moments is one of a training that had none, as those of
        earlier versions: it goes on without.
        """
        names = [*_KEYS, _HIGHEST] if self.amsgrad else _KEYS
        if self.amsgrad and state and not any(key.startswith(_HIGHEST) for key in state):
            names, self.amsgrad = _KEYS, False
            for group in self.optimizer.param_groups:
                group["amsgrad"] = False
        for i, parameter in enumerate(self.adapter.parameters()):
            found = {key: state[f"{key}.{i}"] for key in names if f"{key}.{i}" in state}
            if len(found) == len(names) and _fits(found["exp_avg"], parameter):
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else _padded(value, parameter)
                    for key, value in found.items()
                }


def _fits(values: Tensor, into: Tensor) -> bool:
    return all(n <= room for n, room in zip(values.shape, into.shape, strict=True))


def _padded(values: Tensor, like: Tensor) -> Tensor:
    """Values [n, m] in the corner of zeros of another's shape, on its device."""
    out = torch.zeros_like(like)
    out[: values.shape[0], : values.shape[1]] = values
    return out
