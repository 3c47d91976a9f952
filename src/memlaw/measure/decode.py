"""Greedy decoding, sampling, and tokens as text."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.model.body import body_of, cache_in, cache_name

_LEAST_ALIKE = 8  # tokens: fewer are not worth a pass of their own


class Decoded(NamedTuple):
    """What was decoded from a prompt.

    Attributes:
        ids: tokens.
        margins: nats, for each of them: the highest logit there less the next one. None of them
            where that wasn't asked for, or a model has a way of its own to generate.
    """

    ids: tuple[int, ...]
    margins: tuple[float, ...]


def greedy_decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int | None,
    max_tokens: Sequence[int],
    use_cache: bool = True,
    together: bool = False,
) -> list[tuple[int, ...]]:
    """Plain greedy decoding by Transformers' `generate`, prompts padded on the left.

    The model's own generation settings (sampling, penalties) are not used.

    Args:
        model: a Transformers causal language model, in eval mode.
        prompts: token ids of B prompts, none of them empty.
        end_id: the token to stop at; None: there is none.
        max_tokens: for each prompt the most tokens to generate, ≥ 1.
        use_cache: keep keys and values; without, each token runs the whole sequence.
        together: what all prompts begin with (a chat template's tokens) is run once for all of
            them, where the model can go on from there: the same but for rounding.

    Returns:
        For each prompt the token ids that were generated, the end token included if it came within
        the limit.
    """
    how = {"do_sample": False, "use_cache": use_cache}
    found = _generate(model, prompts, end_id, max_tokens, how, together=together and use_cache)
    return [decoded.ids for decoded in found]


def greedy_decode_with_margins(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int | None,
    max_tokens: Sequence[int],
    use_cache: bool = True,
) -> list[Decoded]:
    """As `greedy_decode`, and by how much each token was ahead of the next one."""
    how = {"do_sample": False, "use_cache": use_cache}
    return _generate(model, prompts, end_id, max_tokens, how, margins=True)


def sample_decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_tokens: Sequence[int],
    seed: int,
    least_p: float = 0.0,
    together: bool = False,
) -> list[tuple[int, ...]]:
    """Answers drawn from the model's own distribution, at temperature 1.

    The state of PyTorch's random number generators is left as it was.

    Args:
        model, prompts, end_id, max_tokens, together: see `greedy_decode`.
        seed: the same seed, prompts and batch give the same answers.
        least_p: tokens less probable than this are not drawn; in [0, 1).

    Returns:
        As `greedy_decode`.
    """
    device = next(model.parameters()).device
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "epsilon_cutoff": least_p}
    with torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device], device_type=device.type
    ):
        torch.manual_seed(seed)
        found = _generate(model, prompts, end_id, max_tokens, how, together=together)
    return [drawn.ids for drawn in found]


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_id: int | None,
    max_tokens: Sequence[int],
    how: Mapping[str, Any],
    *,
    together: bool = False,
    margins: bool = False,
) -> list[Decoded]:
    """Together; one by one, where a model takes what stands before a prompt for a part of it."""
    pad_id = 0 if end_id is None else end_id  # of either nothing is seen
    as_one = len(prompts) == 1 or _pads_are_unseen(model, prompts, pad_id)
    batches = [slice(None)] if as_one else [slice(i, i + 1) for i in range(len(prompts))]
    found: list[Decoded] = []
    for rows in batches:
        limits = max_tokens[rows]
        settings = dict(how) | {"max_new_tokens": max(limits), "eos_token_id": end_id}
        ahead: list[Tensor] | None = [] if margins else None
        said = _said(
            model, prompts[rows], pad_id, settings, begun_once=together, ahead=ahead
        ).sequences
        width = max(map(len, prompts[rows]))
        columns = torch.stack(ahead, dim=1).tolist() if ahead else [[]] * len(limits)
        for row, column, limit in zip(said[:, width:].tolist(), columns, limits, strict=True):
            ids = _until(row, end_id, limit)
            found.append(Decoded(ids, tuple(column[: len(ids)])))
    return found


_PROBED = 3  # tokens
_APART = 0.3  # of the logits: rounding is far below, what reads pads is near 1
_unseen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _pads_are_unseen(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Whether a model says the same in a batch, behind pads, as alone; tried once for each model.

    Some that keep a state instead of looking back (RWKV, linear attention) read what is masked.
    """
    if model not in _unseen:
        pair = [min(prompts, key=len), max(prompts, key=len)]
        how = {"do_sample": False, "max_new_tokens": _PROBED, "output_logits": True}
        together = _said(model, pair, pad_id, how)
        alone = [_said(model, [one], pad_id, how) for one in pair]
        _unseen[model] = all(_alike(own, together, row) for row, own in enumerate(alone))
    return _unseen[model]


def _alike(alone: Any, together: Any, row: int) -> bool:
    """Whether logits are the same, up to the first token that rounding makes another."""
    for own, all_rows in zip(alone.logits, together.logits, strict=True):
        one, other = own[0].float(), all_rows[row].float()
        if not (one - other).norm() <= _APART * one.norm():
            return False
        if one.argmax() != other.argmax():
            return True
    return True


@torch.inference_mode()
def _said(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    how: Mapping[str, Any],
    *,
    begun_once: bool = False,
    ahead: list[Tensor] | None = None,
) -> Any:
    """What `generate` returns for prompts, padded on the left.

    To `ahead` is added, for each token, [B] how far the highest logit is above the next one.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    begun = _begun(model, prompts) if begun_once else None
    n = 0 if begun is None else begun.get_seq_length()
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # pads stand behind what was begun
        for here, ids in (
            (slice(n), prompt[:n]),
            (slice(width - len(prompt) + n, None), prompt[n:]),
        ):
            input_ids[row, here] = torch.tensor(ids, dtype=torch.long)
            attention_mask[row, here] = 1
    # The slice of the last position is not contiguous: PyTorch would copy the head's weights for
    # each row.
    head = model.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(_contiguous)] if head is not None else []
    usual = model.generation_config
    model.generation_config = GenerationConfig(
        pad_token_id=pad_id, return_dict_in_generate=True, **how
    )
    try:
        return model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            logits_processor=[] if ahead is None else [_Ahead(ahead)],
            **({} if begun is None else {cache_name(model): begun}),
        )
    finally:
        for hook in hooks:
            hook.remove()
        model.generation_config = usual


class _Ahead:
    """Looks at logits on their way to the choice of a token, and leaves them as they are."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def __call__(self, input_ids: Tensor, scores: Float32[Tensor, "B V"]) -> Tensor:
        first, second = scores.topk(2).values.T
        self.seen.append(first - second)
        return scores


def _begun(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """The keys and values of what all prompts begin with, for each of them; None: there are none.

    Only of a model that is told positions, and that attends in each layer to all that came before:
    then it doesn't matter where pads stand. Nor may anything look at what the model is given: it
    would not see the prompt as one.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    n = n_alike(prompts)
    if len(prompts) < 2 or n < _LEAST_ALIKE or body_of(model)._forward_pre_hooks:
        return None
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        return None
    ids = torch.tensor([list(prompts[0][:n])], device=next(model.parameters()).device)
    least = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}  # none is wanted
    begun = cache_in(model(input_ids=ids, use_cache=True, **least))
    if type(begun) is not DynamicCache or any(type(x) is not DynamicLayer for x in begun.layers):
        return None
    begun.batch_repeat_interleave(len(prompts))
    return begun


def n_alike(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left over."""
    rows = [tuple(prompt) for prompt in prompts]
    first, last = min(rows), max(rows)  # in the order of their tokens: all lie between
    n = min(map(len, rows)) - 1
    return next((i for i in range(n) if first[i] != last[i]), n)


def _contiguous(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _until(ids: list[int], end_id: int | None, limit: int) -> tuple[int, ...]:
    ids = ids[:limit]
    return tuple(ids[: ids.index(end_id) + 1] if end_id in ids else ids)


def decoded_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The exact text that token ids stand for, special tokens included."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
