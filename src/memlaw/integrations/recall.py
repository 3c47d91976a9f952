"""The audit as a callback: it watches recall and harm, keeps the best adapter, and certifies it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from memlaw.certify.certificate import Certificate
from memlaw.certify.folder import certify_adapter
from memlaw.core.errors import ConfigError, DataError
from memlaw.core.files import made, writing
from memlaw.core.folders import exchange, folder_beside
from memlaw.core.observer import Observer
from memlaw.data.encoding import PromptFormat, encode, resolve_prompt_format
from memlaw.data.reading import read_records
from memlaw.data.record import Example
from memlaw.data.settling import settle_rendering
from memlaw.data.texts import unseen_text
from memlaw.integrations.trained import trained_targets, untrained
from memlaw.measure.damage import measure_damage, windows
from memlaw.measure.examine import Audit, audit_examples

_WINDOWS = 16  # of unseen text, each time: enough to see harm coming; the certificate takes all


class RecallCallback(TrainerCallback):
    """Audits the records every few epochs, and ends the training when they are certified.

    What it finds is logged to whatever the trainer reports to: `recall`, the share of records whose
    tokens all are the argmax; `share_under`, of target tokens under the line; `lowest_p`;
    `delta_nll` on unseen text, in nats per token. Each time it finds a better adapter than before
    (more records, then fewer tokens under the line), that one replaces the one in `folder`. When
    all passes, the folder is audited as a user would load it; if that holds, training stops.
    Otherwise a MemFT trainer aims higher. The folder has a `certificate.json` in either case.

    The audit runs in the main process alone; the others wait.

    Args:
        trainer: the one it watches; its model has a PEFT adapter.
        records: what is to be recited: a path, or Python objects; see `memlaw.read_records`.
        folder: of the best adapter (default: `recall` in the trainer's output folder).
        every: epochs between two audits.
        threshold, margin: a certified token has p ≥ threshold + margin.
        prompt_format: chat, plain, or auto: that of the tokens which the trainer trains.
        damage: also measure ΔNLL at each audit.
        certify: load the base model a second time, in the main process, and certify the folder.

    Attributes:
        audits: what was found so far, a dictionary for each.
        certificate: of the adapter in `folder`; None before there is one.

    Raises:
        ConfigError: there is no PEFT adapter, or the model is sharded.
        DataError: the trainer trains other tokens than the records would be asked for.
    """

    def __init__(
        self,
        trainer: Any,
        records: Any,
        *,
        folder: str | Path | None = None,
        every: int = 1,
        threshold: float = 0.5,
        margin: float = 0.05,
        prompt_format: PromptFormat = "auto",
        damage: bool = True,
        certify: bool = True,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; it must be 1 or more.")
        if not hasattr(trainer.model, "disable_adapter"):
            raise ConfigError("RecallCallback keeps PEFT adapters: give the trainer a peft_config.")
        if getattr(trainer, "is_fsdp_enabled", False) or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "RecallCallback audits in one process, and this model is sharded. Train under DDP, "
                "or audit the folder afterwards: memlaw.certify_adapter(folder, records)."
            )
        self.trainer, self.records = trainer, read_records(records)
        self.folder = Path(folder) if folder else Path(trainer.args.output_dir) / "recall"
        self.every, self.threshold, self.margin = every, threshold, margin
        self.damage, self.wants_certificate = damage, certify
        self.audits: list[dict[str, Any]] = []
        self.certificate: Certificate | None = None
        self._best: tuple[int, int] | None = None
        self.format, self.examples = self._encoded(prompt_format)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Audit, log, keep the best, and stop when it is certified."""
        if round(state.epoch) % self.every:
            return control
        found = self._everywhere(self._look)
        self.audits.append({"epoch": round(state.epoch), **found})
        self.trainer.log({k: v for k, v in found.items() if k in _LOGGED})
        if found["certified"]:
            control.should_training_stop = True
        elif found["refuted"] and hasattr(self.trainer, "objective"):
            self.trainer.threshold = (self.trainer.threshold + 1) / 2
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Certify the best adapter that there was, as far as it goes."""
        if self.wants_certificate and self.certificate is None and self._best is not None:
            self._everywhere(lambda: self._certify() and {})

    def _everywhere(self, look: Any) -> dict[str, Any]:
        """What the main process finds, in all processes."""
        from accelerate.utils import broadcast_object_list

        alone = self.trainer.accelerator.num_processes == 1
        found = [look() if self.trainer.is_world_process_zero() else None]
        result: dict[str, Any] = (found if alone else broadcast_object_list(found))[0] or {}
        return result

    def _look(self) -> dict[str, Any]:
        """Audit the model as it is; `certified` if the folder holds up, `refuted` if it doesn't."""
        wrapped = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with _quiet(wrapped):
            audit = self._audit(wrapped.get_base_model())
            found = {
                "recall": audit.n_recalled / len(audit.records),
                "share_under": audit.n_under / len(audit.tokens),
                "lowest_p": min(r.min_p for r in audit.records),
                "refuted": False,
            }
            if self.damage:
                found["delta_nll"] = self._delta_nll(wrapped)
        now = (audit.n_recalled, -audit.n_under)
        if self._best is None or now >= self._best:
            self._best, self.certificate = now, None
            self._keep(wrapped)
            if audit.certified and self.wants_certificate:
                found["refuted"] = not self._certify().certified
        done = self.certificate.certified if self.certificate else audit.certified
        return found | {"certified": bool(done and audit.certified)}

    def _audit(self, model: Any) -> Audit:
        """Teacher-forced; decoded, too, when nothing speaks against the records any more."""
        tokenizer, line = self.trainer.processing_class, (self.threshold, self.margin)
        asked: Literal["none", "all"]
        for asked in ("none", "all"):
            audit = audit_examples(
                model,
                tokenizer,
                self.examples,
                threshold=line[0],
                margin=line[1],
                decode=asked,
            )
            if audit.n_under:
                break
        return audit

    def _delta_nll(self, wrapped: Any) -> float:
        """ΔNLL on unseen text, nats per token, of the adapter as it is."""

        @contextmanager
        def adapted() -> Iterator[Any]:
            wrapped.base_model.enable_adapter_layers()
            try:
                yield model
            finally:
                wrapped.base_model.disable_adapter_layers()

        model, tokenizer = wrapped.get_base_model(), self.trainer.processing_class
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        text, name = unseen_text()
        ids = windows(tokenizer, text, context=context, n_windows=_WINDOWS)
        with wrapped.disable_adapter():
            found = measure_damage(model, adapted, ids, text_name=name, text=text)
        return found.delta_nll_nats

    def _keep(self, wrapped: Any) -> None:
        """Put the adapter into the folder, whole, in place of the one that was there."""
        made(self.folder.parent)
        with writing(self.folder), folder_beside(self.folder) as work:
            wrapped.save_pretrained(work)
            if self.folder.exists():
                exchange(work, self.folder)
            else:
                os.replace(work, self.folder)

    def _certify(self) -> Certificate:
        self.certificate = certify_adapter(
            self.folder,
            self.records,
            threshold=self.threshold,
            margin=self.margin,
            prompt_format=self.format,
            device=str(self.trainer.args.device),
            observer=Observer(),
        )
        return self.certificate

    def _encoded(self, asked: PromptFormat) -> tuple[Literal["chat", "plain"], list[Example]]:
        """The records as tokens: in the format in which the trainer trains them."""
        tokenizer = self.trainer.processing_class
        trained = trained_targets(self.trainer.train_dataset)
        first = resolve_prompt_format(tokenizer, asked)
        formats: list[Literal["chat", "plain"]] = [first]
        if asked == "auto" and first == "chat" and trained is not None:
            formats.append("plain")
        tried: list[list[str]] = []
        for format in formats:
            settle_rendering(
                self.records, tokenizer, format=format, arguments={}, clock=None, way=None
            )
            examples = encode(self.records, tokenizer, format=format)
            tried.append(untrained(examples, trained) if trained is not None else [])
            if not tried[-1]:
                return format, examples
        missing = min(tried, key=len)
        raise DataError(
            f"the trainer doesn't train the tokens that {len(missing)} of {len(self.records)} "
            f"record(s) would be asked for ({', '.join(missing[:3])}): prompt, completion and end "
            "of turn must be tokenised as memlaw does it. Give the trainer rows of "
            "memlaw.integrations.trained.training_rows(records, tokenizer)."
        )


_LOGGED = ("recall", "share_under", "lowest_p", "delta_nll")


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Within the block the model is in eval mode, without gradients; then as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
