"""Where an activated LoRA is active: from the last occurrence of its invocation tokens on.

The rule is PEFT's (`alora_invocation_tokens`): a row of the input that has the tokens is adapted
from the start of their last occurrence to its end, a row that hasn't is the bare model's. In
decoding with a key-value cache the prompt decides: tokens that follow an adapted prompt are
adapted, others are not, whatever is generated.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memlaw.core.errors import AdapterError
from memlaw.model.body import body_of, cache_in


class Invocation:
    """Finds, in each forward pass of a model, the positions at which an adapter is active.

    Args:
        ids: the invocation tokens, at least one.

    Attributes:
        starts: [B] int64: the first active position of each row of the last input; S for a row
            that is not active.
        shape: (B, S) of that input.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self.starts: Int64[Tensor, "B"] = torch.zeros(0, dtype=torch.long)
        self.shape = (0, 0)
        self._cache: Any = lambda: None  # a weak reference to the cache of the last pass

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within the block, every input of the model, a Transformers one, is looked at."""
        body: nn.Module = body_of(model)
        hooks = [
            body.register_forward_pre_hook(self._look, with_kwargs=True),
            body.register_forward_hook(self._remember),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mask(self) -> Bool[Tensor, "B S"]:
        """The active positions of the last input."""
        places = torch.arange(self.shape[1], device=self.starts.device)
        return places >= self.starts[:, None]

    def offsets(self) -> list[int | None]:
        """The same as PEFT has it: how many positions are active, from the end; None: none is."""
        return [self.shape[1] - start or None for start in self.starts.tolist()]

    def _look(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise AdapterError(
                "an activated adapter looks for its invocation tokens in input_ids, and this model "
                "was given inputs_embeds. Give it input_ids."
            )
        was_active, n_before = self.starts < self.shape[1], self.shape[0]
        self.shape = (input_ids.shape[0], input_ids.shape[1])
        past = cache_in(kwargs)
        if past is None or past.get_seq_length() == 0:
            self.starts = self._find(input_ids, kwargs.get("attention_mask"))
            return
        if self._cache() is not past or n_before != self.shape[0]:
            raise AdapterError(
                "an activated adapter goes on only with the key-value cache of the pass before, in "
                "which it saw the prompt. Run the prompt again with the adapter."
            )
        self.starts = torch.where(was_active, 0, self.shape[1])

    def _remember(self, body: nn.Module, args: Any, output: Any) -> None:
        cache = cache_in(output)
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)

    def _find(self, input_ids: Int64[Tensor, "B S"], attention_mask: Any) -> Int64[Tensor, "B"]:
        n, width = len(self.ids), input_ids.shape[1]
        if width < n:
            return torch.full_like(input_ids[:, 0], width)
        is_one = torch.ones_like(input_ids[:, n - 1 :], dtype=torch.bool)  # of starts: S - n + 1
        for i, token in enumerate(self.ids):
            here = slice(i, width - n + 1 + i)
            is_one = is_one & (input_ids[:, here] == token)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
                is_one = is_one & attention_mask[:, here].bool()  # a pad is no text
        places = torch.arange(is_one.shape[1], device=input_ids.device)
        last = torch.where(is_one, places, -1).amax(dim=1)
        return torch.where(last >= 0, last, width)
