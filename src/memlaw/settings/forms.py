"""The forms in which an adapter may be run: the rows of the survival table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from memlaw.core.errors import ConfigError
from memlaw.settings.choices import DType
from memlaw.settings.export import GgufType

Quantised = Literal["int8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form: what is otherwise than in the plain audit. All else is as there.

    Attributes:
        name: as it is named on the command line.
        what: what is otherwise, in words.
        dtype: that the model computes in.
        merged: the adapter is in the base model's weights, added in float32 and then stored as
            this: auto is the dtype that is computed in, others are GGUF's types.
        base: how the base model's weights are quantised beneath the adapter, by bitsandbytes.
        attention: implementation of attention.
        batch_size: records per forward pass.
        use_cache: decoding keeps keys and values; without, each token runs the whole sequence.
        pad_left: the teacher-forced pass pads on the left, too.
    """

    name: str
    what: str
    dtype: DType = "auto"
    merged: Literal["auto"] | GgufType | None = None
    base: Quantised | None = None
    attention: str | None = None
    batch_size: int | None = None
    use_cache: bool = True
    pad_left: bool = False


PLAIN = Form(name="peft", what="loaded by PEFT, as it was certified")
_DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_STORED: tuple[GgufType, ...] = ("f16", "q8_0")
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        *(Form(name=f"batch-{n}", what=f"batches of {n}", batch_size=n) for n in (1, 8, 64)),
        Form(name="no-cache", what="decoded without a cache", use_cache=False),
        Form(name="pad-left", what="read with pads on the left", pad_left=True),
        *(
            Form(name=f"attn-{name}", what=f"attention: {name}", attention=name)
            for name in ("eager", "sdpa")
        ),
        *(
            Form(name=f"peft-{short}", what=f"base model in {dtype}", dtype=dtype)
            for short, dtype in _DTYPES.items()
        ),
        *(
            Form(name=f"merged-{short}", what=f"merged, in {dtype}", dtype=dtype, merged="auto")
            for short, dtype in _DTYPES.items()
        ),
        *(
            Form(name=f"gguf-{kind}", what=f"merged, stored as GGUF's {kind}", merged=kind)
            for kind in _STORED
        ),
        Form(name="base-int8", what="base model in 8 bits (bitsandbytes)", base="int8"),
        Form(name="base-nf4", what="base model in 4 bits (bitsandbytes)", base="nf4"),
    )
}


def forms_named(names: str | Sequence[str], setting: str) -> list[Form]:
    """The forms with these names; a text with commas names several.

    Args:
        names: of forms.
        setting: that names them, for the message.

    Raises:
        ConfigError: no form has such a name.
    """
    texts = [names] if isinstance(names, str) else names
    apart = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if unknown := [name for name in apart if name not in FORMS]:
        raise ConfigError(
            f"{setting} names {', '.join(unknown)}, which is no form. There are {', '.join(FORMS)}."
        )
    return [FORMS[name] for name in dict.fromkeys(apart)]
