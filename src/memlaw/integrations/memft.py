"""MemFT in any Transformers trainer: the loss, and its normalisation over the whole step.

A step's loss is `Σ w·nll / Σ w` over all its target tokens, however they are spread over
micro-batches and processes. The weights are only known when a micro-batch has been seen, so each
adds the gradient of its sum, and at the end of the step the gradients are divided by the sum of all
weights: exact, without a second pass.

Shapes: as in `rows.py`; V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memlaw.core.errors import ConfigError
from memlaw.integrations.rows import Targets, targets
from memlaw.model.forward import known_body, logits_of, unflatten
from memlaw.settings.choices import resolve_objective
from memlaw.train.memft import memft_threshold, memft_window, sft

OBJECTIVES = ("memft_threshold", "memft_window", "sft")
_SPARE_UNDER = 2 / 3  # a way through the head costs once forwards, twice backwards


class MemFT:
    """Mixin for a `transformers.Trainer`: it stands before it among the bases.

    Args:
        objective: `memft_threshold` (MemFT-OT): only tokens with p ≤ threshold count;
            `memft_window` (MemFT-SW): softly so, mostly behind each record's first error; `sft`:
            all alike. The paper's constants; see `memlaw.train.memft`.
        threshold: in (0, 1). The paper's is 0.5; at 0.6 what counts as learnt passes the
            certificate's line of 0.55.
        *args, **kwargs: as the trainer takes them.

    Raises:
        ConfigError: an objective that needs memlaw's own training; or a setting of the trainer that
            would make another loss of it.
    """

    fused = False  # the model's forward gives log-probabilities for `fused_lm_head=True`

    def __init__(
        self,
        *args: Any,
        objective: str = "memft_threshold",
        threshold: float = 0.6,
        **kwargs: Any,
    ) -> None:
        self.objective = resolve_objective(objective)
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective '{objective}' needs memlaw's own training, which plans ahead ('memlaw "
                f"write'). A trainer can have {', '.join(OBJECTIVES)}."
            )
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold {threshold:g} is out of range (0, 1).")
        self.threshold = threshold
        self._patience: dict[str, Any] = {}  # memft_window's state: a record's, not a row's
        self._moved: dict[str, Any] = {}  # what this step changed of it; None: the entry goes
        self._weight: Tensor | float = 0.0  # of this step's tokens in this process, so far
        self._said: Tensor | float = 0.0  # losses that this step has returned so far
        self._seen: dict[str, Tensor] = {}  # sums since the last log
        super().__init__(*args, **kwargs)
        _require_own_loss(self)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """In training `Σ w·nll` of a micro-batch, its share of a step; else the trainer's own."""
        trainer: Any = self
        if not trainer.model.training or return_outputs:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch
            )
        if "shift_labels" in inputs:
            raise ConfigError("MemFT needs whole rows: turn context and sequence parallelism off.")
        found = targets(inputs)
        inputs = {**inputs, "use_cache": False}
        bare = trainer.accelerator.unwrap_model(model)
        bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
        with _last_hidden(bare) as hidden:
            nll, correct = self._losses(model, inputs, found)
        weights = self._weigh(found, nll.detach(), correct)
        self._note(nll.detach(), correct, weights)
        chosen = weights > 0
        if self._may_spare(bare) and hidden and float(chosen.float().mean()) < _SPARE_UNDER:
            chosen[:1] = True  # so that every process has a way back
            rows = hidden[0][:, :-1][found.keep][chosen]
            nll, weights = self._again(bare, rows, found.token_ids[chosen]), weights[chosen]
        loss = (weights * nll).sum()
        if not len(nll):
            loss = hidden[0].sum() * 0.0 if hidden else loss
        # Means over processes and over micro-batches that are taken later are undone here.
        loss = loss * trainer.accelerator.num_processes
        is_divided = not (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None)
        return loss * (trainer.current_gradient_accumulation_steps if is_divided else 1)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch; with the step's last one the gradients become those of the mean.

        Returns:
            What adds up, over the step, to its loss in nats.
        """
        trainer: Any = self
        loss: Tensor = super().training_step(  # type: ignore[misc]
            model, inputs, num_items_in_batch
        )
        if not trainer.accelerator.sync_gradients:
            self._said = self._said + loss
            return loss
        weight = torch.as_tensor(self._weight, dtype=torch.float32, device=loss.device)
        weight = trainer.accelerator.reduce(weight, "sum")
        said, self._said, self._weight = self._said, 0.0, 0.0
        self._share_patience()
        scale = torch.where(weight > 0, 1 / weight, 0.0)
        parameters = [p for p in model.parameters() if p.grad is not None]
        if weight > 0 or trainer.accelerator.scaler is not None:
            for parameter in parameters:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        else:  # nothing is left to learn: no step, neither momentum nor decay
            for parameter in parameters:
                parameter.grad = None
        return (said + loss) * scale - said

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's; beside `loss` also what MemFT sees of the tokens that are trained."""
        trainer: Any = self
        if "loss" in logs and self._seen:
            sums = {k: float(trainer.accelerator.reduce(v, "sum")) for k, v in self._seen.items()}
            self._seen = {}
            n = max(1.0, sums["n"])
            logs["nll"] = sums["nll"] / n
            logs["mean_token_accuracy"] = sums["correct"] / n
            logs["share_weighted"] = sums["weighted"] / n
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _losses(self, model: Any, inputs: dict[str, Any], found: Targets) -> tuple[Tensor, Tensor]:
        """NLL [N] in nats, with a graph, and whether each target is the argmax [N]."""
        if self.fused:
            out = model(**inputs, fused_lm_head=True)
            if getattr(out, "is_top1", None) is not None:
                return -out.log_probs[found.keep], out.is_top1[found.keep].bool()
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**asked).logits[:, :-1][found.keep]
        nll = F.cross_entropy(logits.float(), found.token_ids, reduction="none")
        at_target = logits.detach().gather(1, found.token_ids[:, None])[:, 0]
        return nll, at_target >= logits.detach().amax(dim=1)

    def _weigh(self, found: Targets, nll: Tensor, correct: Tensor) -> Tensor:
        """Weights [N] ≥ 0 of the target tokens."""
        if not len(nll):
            return nll
        mask = found.mask
        args = (unflatten(nll.float(), mask), unflatten(correct, mask), mask)
        if self.objective == "memft_window":
            names = found.record_ids()
            weights, after = memft_window(
                *args, self._patience, record_ids=names, threshold=self.threshold
            )
            self._moved |= {name: after.get(name) for name in names}
        elif self.objective == "sft":
            weights, _ = sft(*args, {})
        else:
            weights, _ = memft_threshold(*args, {}, threshold=self.threshold)
        return weights[mask]

    def _share_patience(self) -> None:
        """At the end of a step each process learns what the others saw of their records."""
        from accelerate.utils import gather_object

        trainer: Any = self
        moved, self._moved = [self._moved], {}
        if self.objective == "memft_window" and trainer.accelerator.num_processes > 1:
            moved = gather_object(moved)
        for changes in moved:
            self._patience |= changes
        self._patience = {k: v for k, v in self._patience.items() if v is not None}

    def _note(self, nll: Tensor, correct: Tensor, weights: Tensor) -> None:
        self._weight = self._weight + weights.sum()
        now = {
            "n": torch.tensor(float(len(nll)), device=nll.device),
            "nll": nll.sum(),
            "correct": correct.float().sum(),
            "weighted": (weights > 0).float().sum(),
        }
        self._seen = {k: v.float() + self._seen.get(k, 0.0) for k, v in now.items()}

    def _may_spare(self, bare: Any) -> bool:
        """Whether the head can be run again for some tokens: only where it lies here whole."""
        trainer: Any = self
        split = getattr(trainer, "is_fsdp_enabled", False) or trainer.args.torch_compile
        return not split and bare.get_output_embeddings() is not None

    def _again(self, bare: Any, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """NLL [n] of some tokens from their hidden states [n, D]: no way back for the others."""
        trainer: Any = self
        with trainer.compute_loss_context_manager():
            if not self.fused:
                logits = logits_of(bare, hidden).float()
                return F.cross_entropy(logits, token_ids, reduction="none")
            head = bare.get_output_embeddings()
            with known_body(bare, hidden):
                bare.get_output_embeddings = lambda: head  # it is looked for by way of the body
                try:
                    out = bare(
                        input_ids=token_ids[None], shift_labels=token_ids[None], fused_lm_head=True
                    )
                finally:
                    del bare.get_output_embeddings
            return -out.log_probs[0]


def _require_own_loss(trainer: Any) -> None:
    """Raise ConfigError where the trainer's settings ask for a loss that isn't MemFT's."""
    args = trainer.args
    wrong = {
        "a compute_loss_func": trainer.compute_loss_func is not None,
        "label_smoothing_factor": bool(args.label_smoothing_factor),
        f"loss_type {getattr(args, 'loss_type', None)!r}": getattr(args, "loss_type", "nll")
        != "nll",
        "a router's loss (output_router_logits)": bool(getattr(trainer, "aux_loss_enabled", False)),
    }
    if found := [name for name, given in wrong.items() if given]:
        raise ConfigError(f"MemFT is the loss: leave {' and '.join(found)} out.")
    if trainer.is_deepspeed_enabled or args.n_gpu > 1:
        what = "DeepSpeed" if trainer.is_deepspeed_enabled else "DataParallel"
        raise ConfigError(
            f"MemFT can't normalise a step under {what}. Use DDP or FSDP (accelerate launch), or "
            "one device."
        )


@contextmanager
def _last_hidden(bare: Any) -> Iterator[list[Tensor]]:
    """Within the block, what the model's body gives: its last hidden states [B, S, D], in a graph.

    Empty where it gives something else.
    """
    found: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if states is not None:
            found[:] = [states]

    body = getattr(bare, "base_model", bare)
    hook: Any = body.register_forward_hook(note) if body is not bare else None
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()
