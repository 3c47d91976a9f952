"""What would fail after training, tried before it: with an adapter of rank 1 and made-up weights.

Shapes: T target tokens of an example, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from memlaw.core.errors import AdapterError, ModelError
from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.base import BaseModel
from memlaw.model.formats import loaded_adapter, save_adapter
from memlaw.model.forward import collate, head_is_apart, target_logits
from memlaw.model.sites import Site

_ALIKE = 0.05  # how far two ways to one adapter may be apart, of what the adapter changes
_CHANGES = (0.1, 1.0, 10.0)  # what B's numbers are: the first that changes the logits enough


def rehearse(
    base: BaseModel,
    sites: Sequence[Site],
    examples: Sequence[Example],
    *,
    invocation_ids: Sequence[int],
    specificity: bool,
) -> None:
    """See that what is trained can be saved, loaded by PEFT, measured, and recited.

    Args:
        base: the model.
        sites: where the adapter will sit.
        examples: at least one.
        invocation_ids: see `Adapter`.
        specificity: other prompts' answers are measured, too.

    Raises:
        ModelError: logits don't follow from final hidden states, which specificity needs; or they
            are no numbers.
        AdapterError: an adapter on these sites changes no answer, or PEFT doesn't load it, or
            computes something else with it.
    """
    shortest = _shortest(examples)
    bare = _logits(base, shortest)
    if specificity and not head_is_apart(base.model, shortest):
        raise ModelError(
            f"{type(base.model).__name__} computes its logits from more than its final hidden "
            "states, so that what it answers to other prompts can't be held or measured. Give "
            "--no-specificity."
        )
    adapter = Adapter(sites, rank=1, seed=0, invocation_ids=invocation_ids).to(base.model.device)
    for size in _CHANGES:
        with torch.no_grad():
            for b in adapter.b:
                b.fill_(size).mul_(torch.linspace(-1, 1, b.shape[1], device=b.device))
        with adapter.attached(base.model):
            changed = _logits(base, shortest)
        by = (changed - bare).norm()
        if by > 1e-2 * bare.norm():
            break
    names = f"{sites[0].module}{' …' if len(sites) > 1 else ''}"
    if not bare.isfinite().all():
        raise ModelError(
            f"{type(base.model).__name__} computes no numbers in {base.dtype}: its logits are not "
            "finite. Fetch the model again, or give another --dtype."
        )
    if not by > 0:
        raise AdapterError(
            f"an adapter on {names} changes nothing of what {type(base.model).__name__} says. "
            "Name another --placement or --layers."
        )
    loaded = _logits_as_saved(base, adapter, shortest, names)
    if not (loaded - changed).norm() <= max(_ALIKE * by, 1e-2 * bare.norm()):
        raise AdapterError(
            f"PEFT computes something else than is trained with an adapter on {names} of "
            f"{type(base.model).__name__}. Name another --placement."
        )


def _shortest(examples: Sequence[Example]) -> Example:
    return min(examples, key=lambda e: len(e.prompt_ids) + len(e.target_ids))


def _logits(base: BaseModel, example: Example) -> Tensor:
    """[T, V]."""
    with torch.no_grad():
        return target_logits(base.model, collate([example], base.model.device)).float()


def require_causal(base: BaseModel, examples: Sequence[Example]) -> None:
    """See that a model doesn't read the tokens that it is to predict.

    Raises:
        ModelError: another last token changes what is said before it.
    """
    example = _shortest(examples)
    logits = _logits(base, example)
    if not logits.isfinite().all():
        raise ModelError(
            f"{base.spec} computes numbers that are not finite in {base.dtype}. Its weights are "
            "damaged, or too large for this dtype: fetch them again, or give --dtype float32."
        )
    *first, last = example.target_ids
    other = example.prompt_ids[0] if example.prompt_ids[0] != last else (last + 1) % logits.shape[1]
    ids = (*example.prompt_ids, *first, other)
    other_end = Example(record=example.record, prompt_ids=ids[:1], target_ids=ids[1:])
    changed = _logits(base, other_end)[-len(example.target_ids) :]
    limit = 1e-3 if base.model.dtype == torch.float32 else 0.05
    if not (changed - logits).norm() <= limit * logits.norm():
        raise ModelError(
            f"{type(base.model).__name__} sees the tokens that it is to predict: it reads text "
            "both ways, as encoders do. Name a causal language model."
        )


def _logits_as_saved(base: BaseModel, adapter: Adapter, example: Example, names: str) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="memlaw-") as name:
        folder = Path(name)
        save_adapter(adapter, folder, base_path=base.name, base_sha256=base.sha256)
        try:
            with loaded_adapter(folder, base.model):
                return _logits(base, example)
        except AdapterError as error:
            said = str(error).replace(f"{folder}/", "").replace(f"{folder} ", "the adapter ")
            raise AdapterError(
                f"an adapter on {names} of {type(base.model).__name__} could be trained, but not "
                f"used. {said} Name another --placement, such as attn."
            ) from error
