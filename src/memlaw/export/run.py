"""`export`: write an adapter in another form, read it back, and audit it in that form."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memlaw.core.errors import AdapterError, ConfigError, ModelError, OutputError
from memlaw.core.files import (
    made,
    read_json,
    require_usable,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from memlaw.core.folders import folder_beside
from memlaw.core.observer import Observer
from memlaw.export.gguf_files import TensorNames, read_adapter, write_adapter, write_model
from memlaw.export.lm_eval import write_task
from memlaw.export.lora import LoraFactors, lora_factors
from memlaw.export.merged import write_merged
from memlaw.export.modelfile import modelfile
from memlaw.export.vllm import write_for_vllm
from memlaw.measure.examine import Audit
from memlaw.measure.session import Session
from memlaw.model.base import load_model, read_tokenizer
from memlaw.model.formats import peft_names
from memlaw.model.gguf import unpack
from memlaw.model.hashes import tokenizer_sha256
from memlaw.model.locate import gguf_of
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS
from memlaw.settings.audit import AuditConfig
from memlaw.settings.export import ExportConfig
from memlaw.settings.given import settled

MODEL_FILE, ADAPTER_FILE, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, and what it lost.

    Attributes:
        out: the folder that was written.
        before: the audit of the adapter's folder.
        after: that of the export, read back as others will read it.
    """

    out: Path
    before: Audit = field(repr=False)
    after: Audit = field(repr=False)

    @property
    def recites(self) -> bool:
        """Everything that was recited before is recited after."""
        then = {r.sha256 for r in self.before.records if r.recalled}
        return then <= {r.sha256 for r in self.after.records if r.recalled}


def export(
    adapter: str | Path,
    out: str | Path,
    data: Any,
    config: ExportConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> Exported:
    """Write an adapter in another form, and audit it in that form.

    Args:
        adapter: a folder with a PEFT LoRA.
        out: folder to create.
        data: the records; see `read_records`.
        config: the settings; or give them by name.
        observer: is told of progress.
        **settings: fields of `ExportConfig`, instead of `config`.

    Raises:
        MemlawError: adapter, base model, records or settings can't be used; nothing is written.
    """
    config = settled(ExportConfig, config, settings)
    folder, out = Path(adapter), Path(out)
    observer = observer or Observer()
    require_usable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already holds something. Name a folder that is new or empty.")
    factors = {} if config.to == "lm-eval" else lora_factors(folder)
    shared = {
        name: getattr(config, name) for name in ("device", "prompt_field", "completion_field")
    }
    own = AuditConfig(adapter=folder, model=config.model, dtype=config.dtype, **shared)
    session = Session(own, observer)
    session.require_own_base()
    before = session.audit(data)
    if config.to == "lm-eval":
        with _whole(out) as work:
            write_task(before, work)
        return Exported(out=out, before=before, after=before)
    with _whole(out) as work:
        writes = {
            "merged": _merged,
            "gguf": _gguf,
            "gguf-lora": _gguf_lora,
            "peft-vllm": _peft_vllm,
        }
        then = writes[config.to](session, factors, config, work)
        if config.to != "peft-vllm":
            write_text(work / MODELFILE, modelfile(session, before, config.to))
        with then as place:
            after = Session(
                AuditConfig(
                    threshold=before.threshold,
                    margin=before.margin,
                    prompt_format=session.prompt_format,
                    dtype=before.dtype,  # type: ignore[arg-type]
                    device=config.device,
                    **place,
                ),
                observer,
                rendering=session.known_rendering(),
                base=session.base if "adapter" in place else None,
            ).audit(session.records(data))  # as they were read for the run, and said to be
    return Exported(out=out, before=before, after=after)


@contextmanager
def _merged(
    session: Session, factors: dict[str, LoraFactors], config: ExportConfig, work: Path
) -> Iterator[dict[str, Any]]:
    whole = load_model(
        session.base.spec, dtype="float32", device="cpu", spare_tokenizer=session.config.adapter
    )
    whole = dataclasses.replace(whole, tokenizer=session.base.tokenizer)  # the adapter's own
    name = session.base.dtype if config.save_dtype == "auto" else config.save_dtype
    write_merged(whole, factors, work, getattr(torch, name))
    del whole
    yield {"model": str(work)}


@contextmanager
def _gguf(
    session: Session, factors: dict[str, LoraFactors], config: ExportConfig, work: Path
) -> Iterator[dict[str, Any]]:
    _require_words_of_base(session)
    known = session.folder.run.get("base", {}).get("source")  # a run names what it unpacked
    source = gguf_of(session.base.spec) or (gguf_of(known) if known else None)
    if source is None:
        raise ConfigError(
            f"the base model {session.base.spec} is no GGUF file, and its tokenizer would have to "
            "be made anew. Export to gguf-lora, or to merged, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    names = TensorNames(session.base.model.config)
    write_model(source, factors, names, work / MODEL_FILE, config.gguf_type)
    with tempfile.TemporaryDirectory(prefix="memlaw-") as place:
        unpack(work / MODEL_FILE, Path(place))
        yield {"model": place}


@contextmanager
def _gguf_lora(
    session: Session, factors: dict[str, LoraFactors], config: ExportConfig, work: Path
) -> Iterator[dict[str, Any]]:
    _require_words_of_base(session)
    names = TensorNames(session.base.model.config)
    write_adapter(factors, names, work / ADAPTER_FILE)
    back = read_adapter(work / ADAPTER_FILE, list(factors), names)
    folder = session.config.adapter
    if folder is None:
        raise AdapterError("there is no adapter to export.")
    settings = read_json(folder / PEFT_CONFIG, AdapterError, "Fetch or make it again.")
    with tempfile.TemporaryDirectory(prefix="memlaw-") as place:
        weights: dict[str, torch.Tensor] = {}
        for module, own in back.items():
            weights |= dict(zip(peft_names(module), (own.a, own.b), strict=True))
        write_tensors(Path(place) / PEFT_WEIGHTS, weights)
        first = next(iter(back.values()))
        plain: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        plain |= {"r": len(first.a), "lora_alpha": first.scale * len(first.a)}
        write_json(Path(place) / PEFT_CONFIG, settings | plain)
        yield {"model": session.base.spec, "adapter": Path(place)}


@contextmanager
def _peft_vllm(
    session: Session, factors: dict[str, LoraFactors], config: ExportConfig, work: Path
) -> Iterator[dict[str, Any]]:
    name = session.base.dtype if config.save_dtype == "auto" else config.save_dtype
    write_for_vllm(session.base, factors, work, getattr(torch, name))
    if _has_own_words(session):
        session.base.tokenizer.save_pretrained(work)
    yield {"model": session.base.spec, "adapter": work}


def _has_own_words(session: Session) -> bool:
    """Whether the adapter has another tokenizer, or chat template, than its base model."""
    try:
        of_base = tokenizer_sha256(read_tokenizer(session.base.path))
    except ModelError:  # it has none
        return True
    return of_base != session.base.tokenizer_sha256


def _require_words_of_base(session: Session) -> None:
    if _has_own_words(session):
        raise ConfigError(
            f"{session.config.adapter} has a tokenizer or chat template of its own, and in GGUF "
            "the base model's would be used. Export to merged, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `out` when the block ends without an error."""
    made(out.absolute().parent)
    with writing(out), folder_beside(out) as work:
        yield work
        os.replace(work, out)  # which is missing or empty
