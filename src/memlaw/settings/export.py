"""The settings of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlaw.settings.choices import DType

Form = Literal["merged", "gguf", "gguf-lora", "peft-vllm", "lm-eval"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `export`.

    Attributes:
        to: merged is a whole model in Transformers' format; gguf is one in llama.cpp's, of a base
            model that is a GGUF file; gguf-lora is the adapter alone in llama.cpp's; peft-vllm is
            it in PEFT's, as vLLM takes it; lm-eval is no model but a task of the records' text, for
            that harness.
        save_dtype: dtype of the merged weights, or of an adapter for vLLM; auto is the one that the
            adapter was audited in.
        gguf_type: type of the adapted weights in a GGUF model; all others are copied as they are.
        model: base model (default: the adapter's own).
        device: torch device to audit on; auto is CUDA if there is one, else MPS, else the CPU.
        dtype: dtype to audit in; auto is the one that the adapter was certified in, else what
            plain from_pretrained uses.
        prompt_field: name of the prompt's field in the data (default: the run's, else prompt).
        completion_field: name of the completion's field in the data (default: the run's, else
            completion).
    """

    to: Form = "merged"
    save_dtype: DType = "auto"
    gguf_type: GgufType = "f16"
    model: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    prompt_field: str | None = None
    completion_field: str | None = None
