"""An adapter run in one form after another: other dtypes, merged, quantised, batched, padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from memlaw.core.errors import ModelError
from memlaw.data.record import Example
from memlaw.export.gguf_files import as_stored
from memlaw.export.lora import LoraFactors, lora_factors
from memlaw.export.merged import merged_weights, with_weights
from memlaw.measure.examine import Audit, audit_examples
from memlaw.model.base import BaseModel, load_model
from memlaw.model.formats import loaded_adapter
from memlaw.model.quantised import load_quantised
from memlaw.settings.choices import Decode, DType
from memlaw.settings.forms import Form


class Bench:
    """A base model on which adapters in folders are audited, in whatever form.

    Args:
        base: as the plain audit has it; it is what it was after each audit.
        trust_remote_code: as it was loaded with.
    """

    def __init__(self, base: BaseModel, *, trust_remote_code: bool = False) -> None:
        self.base, self._trust = base, trust_remote_code
        self._other: BaseModel | None = None  # in the dtype that was needed last
        self._bare: dict[str, Tensor] = {}  # weights of adapted modules, [O, I] float32

    def audit(
        self,
        folder: Path,
        form: Form,
        examples: Sequence[Example],
        *,
        threshold: float,
        margin: float,
        batch_size: int,
        decode: Decode = "all",
        end: bool = True,
        end_id: int | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Audit:
        """Audit the adapter of a folder in a form.

        Args:
            folder: the adapter's.
            form: what is otherwise.
            examples, threshold, margin, decode, end, end_id, progress: see `audit_examples`.
            batch_size: likewise; a form may have its own.

        Raises:
            MemlawError: it can't be run in this form here; the message says why.
        """
        try:
            with self._model(folder, form) as model, _attending(model, form.attention):
                return audit_examples(
                    model,
                    self.base.tokenizer,
                    examples,
                    threshold=threshold,
                    margin=margin,
                    batch_size=form.batch_size or batch_size,
                    decode=decode,
                    end=end,
                    end_id=end_id,
                    use_cache=form.use_cache,
                    pad_left=form.pad_left,
                    progress=progress,
                )
        except (RuntimeError, NotImplementedError, ValueError) as error:  # a kernel that isn't here
            raise ModelError(f"{type(error).__name__}: {str(error)[:200]}") from error

    @contextmanager
    def _model(self, folder: Path, form: Form) -> Iterator[Any]:
        if form.base is not None:
            bare = load_quantised(self.base, form.base, trust_remote_code=self._trust)
        elif form.merged is not None:
            factors = lora_factors(folder)
            weights = self._merged(factors)
            if form.merged != "auto":
                weights = {name: as_stored(w, form.merged) for name, w in weights.items()}
            with with_weights(self._in(form.dtype).model, weights) as merged:
                yield merged
            return
        else:
            bare = self._in(form.dtype).model
        with loaded_adapter(folder, bare) as adapted:
            yield adapted

    def _merged(self, factors: dict[str, LoraFactors]) -> dict[str, Tensor]:
        """Merged weights; the bare ones in float32 are read once."""
        if factors.keys() != self._bare.keys():
            nothing = {
                name: LoraFactors(a=own.a, b=own.b * 0, scale=1.0) for name, own in factors.items()
            }
            self._bare = merged_weights(self._in("float32"), nothing)
            if self.base.dtype != "float32":
                self._other = None  # a whole model more, for a few weights
        return {name: self._bare[name] + own.delta for name, own in factors.items()}

    def _in(self, dtype: DType) -> BaseModel:
        if dtype in ("auto", self.base.dtype):
            return self.base
        if self._other is None or self._other.dtype != dtype:
            self._other = None
            self._other = load_model(
                self.base.spec,
                dtype=dtype,
                device=str(self.base.model.device),
                trust_remote_code=self._trust,
            )
        return self._other


@contextmanager
def _attending(model: Any, implementation: str | None) -> Iterator[None]:
    """Within the block a model attends by another implementation."""
    usual = model.config._attn_implementation
    if implementation in (None, usual):
        yield
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ModelError(f"attention can't be {implementation}: {str(error)[:200]}") from error
    try:
        if model.config._attn_implementation != implementation:
            raise ModelError(f"{type(model).__name__} has no attention {implementation}.")
        yield
    finally:
        model.set_attn_implementation(usual)
