"""A base model with all adapters of a folder, and what tells which of them a prompt belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import AdapterError
from memlaw.core.observer import Observer
from memlaw.data.encoding import encode_prompt, end_of_turn_id
from memlaw.data.record import Prompt
from memlaw.data.rendering import Rendering, set_rendering
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.decode import decoded_text, greedy_decode
from memlaw.model.base import BaseModel, load_model
from memlaw.model.hashes import weights_sha256
from memlaw.model.locate import locate
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS
from memlaw.model.tokenizer import with_tokenizer
from memlaw.shards.layout import is_sharded, read_index, shard_folder
from memlaw.shards.routing import Route, Router

BARE = "__base__"  # what PEFT calls the base model, among the names of adapters
_ONLY = "default"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A base model with adapters, and where prompts go.

    Attributes:
        model: the `PeftModel`; its adapters have their shards' names, or `default`.
        tokenizer: its tokenizer, with prompts rendered as when they were written.
        format: of prompts, `chat` or `plain`.
        router: finds the adapter; None: there is but one.
    """

    model: Any
    tokenizer: Any
    format: Literal["chat", "plain"]
    router: Router | None

    def route(self, prompt: Prompt) -> Route:
        """Where a prompt goes."""
        if self.router is None:
            return Route(adapter=_ONLY, exact=False)
        return self.router.route(prompt)

    def names(self, prompts: Sequence[Prompt]) -> list[str]:
        """The adapter of each prompt, as PEFT's `generate` takes them: `adapter_names=`."""
        return [self.route(prompt).adapter or BARE for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        names: Sequence[str] | None = None,
        max_tokens: int = 512,
    ) -> list[str]:
        """The answer to each prompt, decoded greedily, one after the other, each by its adapter.

        Args:
            prompts: as records have them.
            names: of the adapters; None: as `names` finds them.
            max_tokens: of an answer, at most.
        """
        end = end_of_turn_id(self.tokenizer, self.format)
        answers = []
        for prompt, name in zip(prompts, names or self.names(prompts), strict=True):
            ids = encode_prompt(self.tokenizer, prompt, self.format)
            with _active(self.model, name) as model:
                (found,) = greedy_decode(model, [ids], end_id=end, max_tokens=[max_tokens])
            answers.append(decoded_text(self.tokenizer, [t for t in found if t != end]))
        return answers


def load(
    out: str | Path, model: Any = None, *, tokenizer: Any = None, threshold: float | None = None
) -> Loaded:
    """Put all adapters of a folder onto a base model.

    Args:
        out: a folder that `write` or `write_shards` finished.
        model: the base model, as Transformers loads it: it is wrapped; None: it is loaded, unless
            it needs code of its own.
        tokenizer: its tokenizer; None: the folder's own, else the base model's.
        threshold: of shards: the likeness under which the bare model answers; None: the folder's.

    Raises:
        AdapterError: another base model, or adapters that PEFT has no form for.
        MemlawError: index or private files are missing.
    """
    from peft import PeftModel

    out = Path(out)
    folder = AdapterFolder(out)
    if not folder.run:
        raise AdapterError(f"{out} holds no run of memlaw. Load it by PEFT alone.")
    names = list(read_index(out).adapters) if is_sharded(out) else []
    places = {name: shard_folder(out, name) for name in names} or {_ONLY: out}
    for place in places.values():
        if (place / PEFT_CONFIG).is_file() and not (place / PEFT_WEIGHTS).is_file():
            raise AdapterError(f"{place} has no {PEFT_WEIGHTS}; pickled weights are never loaded.")
        if not (place / PEFT_CONFIG).is_file():
            raise AdapterError(
                f"{place} has no {PEFT_CONFIG}: PEFT has no form for an adapter placed like this. "
                "'memlaw ask' runs it."
            )
    if model is None or tokenizer is None:
        base = own_base(out, None, Observer())
        model = base.model if model is None else model
        tokenizer = base.tokenizer if tokenizer is None else tokenizer
    _require_own(folder, model)
    set_rendering(tokenizer, _rendering_of(folder))
    wrapped: Any = None
    for name, place in places.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(place), adapter_name=name)
        else:
            wrapped.load_adapter(str(place), adapter_name=name)
    wrapped.eval()
    format = folder.run["prompt_format"]
    router = None
    if names:
        router = Router(out, lambda: _active(wrapped, BARE), tokenizer, format, threshold)
    return Loaded(model=wrapped, tokenizer=tokenizer, format=format, router=router)


@contextmanager
def _active(model: Any, name: str) -> Iterator[Any]:
    """The model with one of its adapters, or with none."""
    if name == BARE:
        with model.disable_adapter():
            yield model.get_base_model()
    else:
        model.set_adapter(name)
        yield model


def own_base(
    out: Path, model: str | None, observer: Observer, tokenizer: str | None = None
) -> BaseModel:
    """The base model of a folder, loaded, with the folder's tokenizer, or with one that is named.

    Code that comes with it isn't run, whatever is asked.

    Raises:
        AdapterError: `model` is another one.
    """
    folder = AdapterFolder(out)
    base = load_model(
        model or folder.base_model or "",
        dtype=folder.run["dtype"],
        tokenizer=tokenizer,
        spare_tokenizer=out,
        notice=observer.notice,
    )
    _require_hash(folder, base.sha256, base.spec)
    return with_tokenizer(base, tokenizer, out, observer.notice)


def router_of(out: Path, base: BaseModel, threshold: float | None) -> Router:
    """The router of a folder of shards, on its own base model without an adapter."""
    folder = AdapterFolder(out)
    set_rendering(base.tokenizer, _rendering_of(folder))
    format = folder.run["prompt_format"]
    return Router(out, lambda: nullcontext(base.model), base.tokenizer, format, threshold)


def _rendering_of(folder: AdapterFolder) -> Rendering:
    """How a folder's prompts were rendered when it was written."""
    found = folder.run.get("rendering", {})
    return Rendering(
        arguments=found.get("template_args", {}),
        clock=found.get("clock"),
        way=found.get("prompt_rendering", "generation"),
    )


def _require_own(folder: AdapterFolder, model: Any) -> None:
    """See that a loaded model is the adapters' own, where its files are here to tell."""
    name = str(getattr(model, "name_or_path", ""))
    if name and Path(name).is_dir():
        _require_hash(folder, weights_sha256(locate(name, lambda text: None)[0]), name)


def _require_hash(folder: AdapterFolder, sha256: str, spec: str) -> None:
    if folder.base_sha256 != sha256:
        raise AdapterError(
            f"{folder.path} was written into another base model than {spec}: the hashes of their "
            f"weights are {str(folder.base_sha256)[:12]}… and {sha256[:12]}…. Name the right one."
        )
