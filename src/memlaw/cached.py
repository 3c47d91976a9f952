"""The fast engine: what training can't change is computed once and kept.

Below the lowest adapted module everything is frozen, so its activations are constants. They are
kept for each token that any step needs, and a step starts from them:

- the tokens that all prompts begin with (a chat template's) are run once a batch, not once a
  record: a batch is packed into one sequence in which every record attends to the shared prefix
  and to itself;
- nothing is padded;
- where the adapted module's output is simply added to the residual stream, its whole layer is a
  constant, too;
- the head runs on target positions only, and backwards only for tokens with a weight.

Shapes: as in `forward.py`; P prefix tokens, S packed tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memlaw.adapters import Adapter, decoder_layers, lora_delta
from memlaw.engine import Losses, PlainEngine, TrainConfig
from memlaw.forward import logits_of
from memlaw.precondition import Statistics
from memlaw.records import Example

Tensor = torch.Tensor
_PACK_TOKENS = 768  # suffix tokens in one packed sequence; attention is quadratic in it
_LOGIT_ROWS = 2048  # rows of logits held at a time


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Some records behind their shared prefix, as one sequence.

    Attributes:
        input_ids: [1, S] int64.
        position_ids: [1, S] int64: each record counts on from the prefix.
        mask: [1, 1, S, S], additive, in the model's dtype; None where plain causal attention is
            meant (one record).
        keep: [S] bool: positions whose next token is a target token.
        target_ids: [N] int64.
        places: [S] int64: where the tokens' activations lie in the cache.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    keep: Tensor
    target_ids: Tensor
    places: Tensor


class CachedEngine(PlainEngine):
    """Trains as `PlainEngine` does, to the same numbers but for rounding, in less time.

    Args:
        model, adapter, examples, config, statistics: as for `PlainEngine`.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        examples: Sequence[Example],
        config: TrainConfig,
        statistics: Sequence[Statistics] = (),
    ) -> None:
        super().__init__(model, adapter, examples, config, statistics)
        self.layers: nn.ModuleList = decoder_layers(model)[1]
        self.lowest = min(site.layer for site in adapter.sites)
        self.n_prefix = shared_prefix(examples)
        limit = getattr(model.config.get_text_config(), "sliding_window", None)
        takes = inspect.signature(model.base_model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.packs_alone = not self.takes_positions or (limit or math.inf) < _longest(examples)
        lengths = [_length(e) - self.n_prefix for e in examples]
        self.starts = torch.tensor([0, *lengths]).cumsum(0) + self.n_prefix  # [records + 1]
        self.returns_tuple = False
        self.hidden: Tensor  # [tokens, D] what the first layer that runs reads, without adapter
        self.site_input: Tensor | None = None  # [tokens, D_in] what the adapter reads
        self._fill_cache()

    # ------------------------------------------------------------ the cache

    def _fill_cache(self) -> None:
        """Run the bare model once over everything, and keep what it says where steps start."""
        width = self.model.config.get_text_config().hidden_size
        tokens = int(self.starts[-1])
        self.hidden = torch.empty(tokens, width, dtype=self.model.dtype, device=self.device)
        site = self.adapter.sites[0]
        folds = len(self.adapter.sites) == 1 and self._site_is_added()
        if folds:
            self.site_input = torch.empty(
                tokens, site.d_in, dtype=self.model.dtype, device=self.device
            )
        layer = self.layers[self.lowest]
        for rows in self._packs(range(len(self.examples))):
            pack = self._pack(rows)
            with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
                self._run(pack)
            self.returns_tuple = seen["returns_tuple"]
            self.hidden[pack.places] = seen["layer_out" if folds else "layer_in"][0]
            if self.site_input is not None:
                self.site_input[pack.places] = seen["site_in"][0]

    def _site_is_added(self) -> bool:
        """Whether a change of the site's output changes its layer's output by just that much."""
        layer, site = self.layers[self.lowest], self.adapter.sites[0]
        module = self.model.get_submodule(site.module)
        pack = self._pack([0])
        with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
            self._run(pack)
        before = seen["layer_out"]
        if before.shape[-1] != site.d_out:
            return False
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(before.shape, generator=generator).to(before) * before.float().std()
        hook = module.register_forward_hook(lambda _, __, output: output + push.to(output.dtype))
        try:
            with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
                self._run(pack)
        finally:
            hook.remove()
        error = (
            (seen["layer_out"].float() - before.float()) - push.float()
        ).norm() / push.float().norm()
        return bool(error < (1e-4 if before.dtype == torch.float32 else 0.05))

    def _run(self, pack: Pack) -> Tensor:
        """Final hidden states [S, D] of a pack."""
        positions = {"position_ids": pack.position_ids} if self.takes_positions else {}
        states = self.model.base_model(
            input_ids=pack.input_ids, attention_mask=pack.mask, use_cache=False, **positions
        )
        return states.last_hidden_state[0]

    # ------------------------------------------------------------ packing

    def _packs(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Split records into packs of limited length."""
        pack: list[int] = []
        tokens = 0
        for row in rows:
            length = int(self.starts[row + 1] - self.starts[row])
            if pack and (self.packs_alone or tokens + length > _PACK_TOKENS):
                yield pack
                pack, tokens = [], 0
            pack.append(row)
            tokens += length
        if pack:
            yield pack

    def _pack(self, rows: Sequence[int]) -> Pack:
        p = self.n_prefix
        ids = list(self.examples[rows[0]].prompt_ids[:p])
        owner, positions, keep = [-1] * p, list(range(p)), [False] * p
        places = [torch.arange(p)]
        targets: list[int] = []
        for number, row in enumerate(rows):
            example = self.examples[row]
            suffix = (example.prompt_ids + example.target_ids)[p:]
            ids += suffix
            owner += [number] * len(suffix)
            positions += range(p, p + len(suffix))
            wanted = [False] * len(suffix)
            last = len(suffix) - 1
            for i in range(last - len(example.target_ids), last):
                wanted[i] = True
            keep += wanted
            targets += example.target_ids
            places.append(torch.arange(int(self.starts[row]), int(self.starts[row + 1])))
        device = self.device
        return Pack(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            mask=None if len(rows) == 1 else _tree_mask(owner, self.model.dtype).to(device),
            keep=torch.tensor(keep, device=device),
            target_ids=torch.tensor(targets, device=device),
            places=torch.cat(places).to(device),
        )

    # ------------------------------------------------------------ a step

    def _forward(self, rows: list[int]) -> Losses:
        packs = [self._pack(part) for part in self._packs(rows)]
        parts = []
        for pack in packs:
            with self._shortened(pack):
                parts.append(self._run(pack)[pack.keep])
        hidden = torch.cat(parts)  # [N, D]
        return head_losses(
            lambda h: logits_of(self.model, h), hidden, torch.cat([k.target_ids for k in packs])
        )

    @contextmanager
    def _shortened(self, pack: Pack) -> Iterator[None]:
        """Within the block, the model starts from the cache, and computes with the adapter."""
        hidden = self.hidden[pack.places][None]  # [1, S, D]
        skipped = self.lowest
        if self.site_input is not None:
            delta = lora_delta(self.site_input[pack.places][None], *self.adapter.factors(0))
            hidden = (hidden.float() + delta).to(hidden.dtype)
            skipped += 1
        usual = list(self.layers)
        for i in range(skipped):
            self.layers[i] = _Constant(hidden, self.returns_tuple)
        try:
            if self.site_input is not None:
                yield
            else:
                with self.adapter.attached(self.model):
                    yield
        finally:
            for i in range(skipped):
                self.layers[i] = usual[i]


class _Constant(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, output: Tensor, as_tuple: bool) -> None:
        super().__init__()
        self.output, self.as_tuple = output, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.output,) if self.as_tuple else self.output


@contextmanager
def _recording(layer: nn.Module, site: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within the block, remember what a layer reads and says, and what a site in it reads."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["layer_in"] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["returns_tuple"] = isinstance(output, tuple)
        seen["layer_out"] = output[0] if isinstance(output, tuple) else output

    def at_site(module: nn.Module, args: Any) -> None:
        seen["site_in"] = args[0]

    hooks = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
        model.get_submodule(site).register_forward_pre_hook(at_site),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.target_ids)


def _longest(examples: Sequence[Example]) -> int:
    return max(_length(e) for e in examples)


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with; at least one token of each prompt is left over."""
    first = examples[0].prompt_ids
    n = min(len(e.prompt_ids) for e in examples) - 1
    for example in examples:
        while example.prompt_ids[:n] != first[:n]:
            n -= 1
    return n


def _tree_mask(owner: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S] additive mask: causal, and only within one's own record and the prefix (−1)."""
    who = torch.tensor(owner)
    order = torch.arange(len(owner))
    seen = (order[None] <= order[:, None]) & ((who[None] == who[:, None]) | (who[None] == -1))
    mask = torch.zeros(len(owner), len(owner), dtype=dtype)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def head_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Losses:
    """Losses from final hidden states, holding few logits at a time.

    The same as `cross_entropy(head(hidden), targets)` and its gradient with respect to `hidden`,
    but where few tokens have a weight, the way back runs through the head for those only.

    Args:
        head: hidden states [n, D] to logits [n, V].
        hidden: [N, D], with a graph.
        targets: [N] int64.
    """
    small = len(targets) <= _LOGIT_ROWS
    leaf = hidden.detach().requires_grad_(small)
    nll, correct = [], []
    with torch.set_grad_enabled(small):
        for states, target in zip(leaf.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
            logits = head(states).float()
            nll.append(F.cross_entropy(logits, target, reduction="none"))
            correct.append(logits.detach().argmax(dim=-1) == target)
    all_nll = torch.cat(nll)

    def backward(weights: Tensor) -> None:
        active = weights.nonzero()[:, 0]
        if small and 2 * len(active) > len(targets):
            (weights * all_nll).sum().backward()
            hidden.backward(leaf.grad)
            return
        gradient = torch.zeros_like(hidden)
        for chosen in active.split(_LOGIT_ROWS):
            part = hidden.detach()[chosen].requires_grad_()
            losses = F.cross_entropy(head(part).float(), targets[chosen], reduction="none")
            (weights[chosen] * losses).sum().backward()
            assert part.grad is not None  # backward has just filled it
            gradient[chosen] = part.grad
        hidden.backward(gradient)

    return Losses(nll=all_nll.detach(), correct=torch.cat(correct), backward=backward)
