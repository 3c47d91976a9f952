"""Which adapter a prompt belongs to: its record's own, or that of the nearest record.

Near is told by the bare model's last hidden state at a prompt's end, what it is about to answer
from. States are standardised by those of the records' prompts and of everyday conversations, and
compared by their cosine. Under a threshold the bare model answers: it is what 99 of 100 of those
conversations, none of which has to do with the records, stay under.

Shapes: N prompts, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from memlaw.core.commitment import PRIVATE_FOLDER
from memlaw.core.errors import OutputError
from memlaw.core.files import json_sha256, write_tensors
from memlaw.data.conversations import training_conversations
from memlaw.data.encoding import encode_prompt
from memlaw.data.record import Prompt, Record
from memlaw.data.texts import general_texts
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel
from memlaw.model.body import body_of
from memlaw.model.cache import Kept, kept
from memlaw.shards.layout import Index, index_key, read_index

ROUTES_FILE = f"{PRIVATE_FOLDER}/routes.safetensors"  # a prompt can be guessed from its state
_STRAY = 0.99  # share of everyday conversations that must go to the bare model
_N_CONVERSATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a prompt goes.

    Attributes:
        adapter: a shard's name; None: the bare model answers.
        exact: the prompt is a record's.
        likeness: the cosine to the nearest record's prompt; None: it didn't have to be computed.
    """

    adapter: str | None
    exact: bool
    likeness: float | None = None


class Router:
    """Finds the adapter for prompts.

    Args:
        out: a folder of shards, with its private files.
        bare: gives a context whose value is the base model without an adapter.
        tokenizer: its tokenizer, with the rendering that the shards were written with.
        format: of prompts, `chat` or `plain`.
        threshold: of the likeness; default: the folder's own.

    Raises:
        MemlawError: index or private files are missing, or can't be read.
    """

    def __init__(
        self,
        out: Path,
        bare: Callable[[], AbstractContextManager[Any]],
        tokenizer: Any,
        format: Literal["chat", "plain"],
        threshold: float | None = None,
    ) -> None:
        self.index: Index = read_index(out)
        self.key = index_key(out)
        self.bare, self.tokenizer, self.format = bare, tokenizer, format
        tensors = _read_routes(out)
        self.mean, self.spread = tensors["mean"], tensors["spread"]
        self.states = _standard(tensors["states"].float(), self.mean, self.spread)  # [N, D]
        self.shards = tensors["shards"]
        self.threshold = float(tensors["threshold"]) if threshold is None else threshold

    def route(self, prompt: Prompt) -> Route:
        """Where one prompt goes."""
        if (name := self.index.adapter_of(prompt, self.key)) is not None:
            return Route(adapter=name, exact=True)
        ids = encode_prompt(self.tokenizer, prompt, self.format)
        with self.bare() as model:
            state = _standard(last_states(model, [ids]), self.mean, self.spread)
        likeness, nearest = (self.states @ state[0]).max(0)
        if float(likeness) < self.threshold:
            return Route(adapter=None, exact=False, likeness=float(likeness))
        name = list(self.index.adapters)[int(self.shards[nearest])]
        return Route(adapter=name, exact=False, likeness=float(likeness))


def write_routes(
    out: Path,
    parts: Mapping[str, Sequence[Record]],
    base: BaseModel,
    format: str,
) -> None:
    """Keep the states of all records' prompts, and the threshold that follows from them.

    Args:
        out: a folder of shards.
        parts: each shard's records.
        base: the base model, bare.
        format: of prompts.
    """
    records = [record for part in parts.values() for record in part]
    subject = Subject(base=base, texts=general_texts(), records=records, format=format)  # type: ignore[arg-type]
    prompts = [ids for _, ids in subject.encoded([r.prompt for r in records], room=0)]
    states = last_states(base.model, prompts).half()  # [N, D]
    everyday = training_conversations()[:_N_CONVERSATIONS]
    asked = [ids for _, ids in subject.encoded(everyday, room=0)]

    def make() -> Kept:
        return Kept(None, {"states": last_states(base.model, asked)})

    others = kept(base, "last-states", {"prompts": json_sha256(asked)}, make).tensors["states"]
    both = torch.cat([states.float(), others])
    mean, spread = both.mean(0), both.std(0) + 1e-3
    known = _standard(states.float(), mean, spread)
    nearest = (_standard(others, mean, spread) @ known.T).amax(1)
    numbers = [n for n, part in enumerate(parts.values()) for _ in part]
    tensors = {
        "states": states,
        "mean": mean,
        "spread": spread,
        "shards": torch.tensor(numbers, dtype=torch.int32),
        "threshold": nearest.quantile(_STRAY),
    }
    write_tensors(out / ROUTES_FILE, tensors, private=True)


@torch.no_grad()
def last_states(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The final hidden state at each prompt's last token: [N, D] float32, on the CPU."""
    device, body = next(model.parameters()).device, body_of(model)
    states = [
        body(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        .last_hidden_state[0, -1]
        .float()
        .cpu()
        for ids in prompts
    ]
    return torch.stack(states)


def _standard(states: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return torch.nn.functional.normalize((states - mean) / spread, dim=1)


def _read_routes(out: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = out / ROUTES_FILE
    try:
        return load_file(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OutputError(
            f"{path} can't be read ({error}), and without it only records' own prompts find their "
            "adapter. Fetch it again."
        ) from error
