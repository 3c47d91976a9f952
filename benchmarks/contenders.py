"""What `against_trl.py` starts as a process of its own: one contender, measured once.

Imports, and loading the base model, are outside every clock.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook

import memlaw
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.reading import read_records
from memlaw.data.record import Example, Record
from memlaw.data.texts import retained_text, unseen_text
from memlaw.measure.damage import Damage, measure_damage, windows
from memlaw.measure.examine import audit_examples
from memlaw.model.base import BaseModel, load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.choices import EMBEDDED

BATCH = 10
LAYER = 20
MODULE = f"model.layers.{LAYER}.mlp.down_proj"
PAPER_RECIPE: dict[str, Any] = {
    "placement": "mlp",
    "whiten": False,
    "retention": 0.0,
    "schedule": "constant",
    "betas": (0.9, 0.999),
}
DECODE_FROM = 0.95  # share of records with every token the argmax, from which TRL's are decoded

Spec = dict[str, Any]
Measurement = dict[str, Any]


def measure(spec: Spec) -> Measurement:
    """Measure what `spec` asks for: the part and the contender, and their settings."""
    torch.set_num_threads(spec["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_trl = spec["contender"].startswith("trl")
    if spec["part"] == "step":
        return _trl_step(spec) if is_trl else _memlaw_step(spec)
    return _trl_recall(spec) if is_trl else _memlaw_recall(spec)


# ---------------------------------------------------------------- what both sides share


def _records(spec: Spec) -> list[Record]:
    records = read_records(spec["data"], prompt_field="query", completion_field="target")
    return records[: spec["records"]]


def _examples(spec: Spec, base: BaseModel) -> list[Example]:
    return encode(
        _records(spec),
        base.tokenizer,
        format=resolve_prompt_format(base.tokenizer, "auto"),
        max_tokens=base.context_length,
    )


class Memory:
    """Peak resident memory of this process, while a model is loaded and from then on."""

    def __init__(self) -> None:
        self.loading_mb: float | None = None

    def end_loading(self) -> None:
        """Note the peak, and start again from what is resident now, where the system allows it."""
        peak = _peak_mb()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return
        self.loading_mb = peak

    def report(self) -> Measurement:
        """Both peaks; where the system can't tell them apart, `peak_mb` is the higher one."""
        return {"loading_peak_mb": self.loading_mb, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextmanager
def _step_ends() -> Iterator[list[float]]:
    """Within the block, the times at which any optimiser has ended a step; first, its beginning."""

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    ends = [time.perf_counter()]
    hook = register_optimizer_step_post_hook(note)
    try:
        yield ends
    finally:
        hook.remove()


def _step_measurement(ends: list[float], spec: Spec, **more: Any) -> Measurement:
    """From the end of a step to the end of the next: data, forward, backward, optimiser."""
    seconds = [after - before for before, after in pairwise(ends)]
    timed = seconds[spec["warm_up"] : spec["warm_up"] + spec["steps"]]
    return {"median_s": statistics.median(timed), "seconds": timed, **more}


def _damage_measurement(damage: Damage) -> Measurement:
    low, high = damage.delta_nll_ci95
    return {
        "delta_nll_nats": _finite(damage.delta_nll_nats),
        "delta_nll_ci95": [_finite(low), _finite(high)],
        "kl_nats": _finite(damage.kl_nats),
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, and training that diverged has nothing else."""
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------- TRL


def _trainer(
    spec: Spec, base: BaseModel, examples: list[Example], folder: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """An SFTTrainer on memlaw's own tokens, and its settings."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    class FullLogitsTrainer(SFTTrainer):
        """With Transformers' loss instead of TRL's, which on a CPU runs the head twice, in pieces,
        on prompts as well, and an entropy with it."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return transformers.Trainer.compute_loss(self, *args, **kwargs)

    disable_progress_bars()
    rows = [
        {
            "input_ids": [*e.prompt_ids, *e.target_ids],
            "labels": [-100] * len(e.prompt_ids) + list(e.target_ids),
        }
        for e in examples
    ]
    settings |= {
        "per_device_train_batch_size": BATCH,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": spec["schedule"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": spec["seed"],
        "bf16": spec["contender"].endswith("autocast"),
        "gradient_checkpointing": False,
        "use_cpu": base.model.device.type == "cpu",
        "dataloader_num_workers": 0,
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    modules = spec.get("modules", [MODULE])
    lora = {"r": spec["rank"], "lora_alpha": spec["rank"], "target_modules": modules}
    trainer_class = FullLogitsTrainer if "logits" in spec["contender"] else SFTTrainer
    trainer = trainer_class(
        model=base.model,
        args=SFTConfig(output_dir=folder, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    return trainer, {**settings, **lora, "dtype": base.dtype, "lora_dtype": sorted(dtypes)}


def _trl_step(spec: Spec) -> Measurement:
    memory = Memory()
    base = load_model()
    memory.end_loading()
    n_steps = spec["warm_up"] + spec["steps"]
    with tempfile.TemporaryDirectory() as folder:
        trainer, settings = _trainer(spec, base, _examples(spec, base), folder, max_steps=n_steps)
        with _step_ends() as ends:
            trainer.train()
    return _step_measurement(ends, spec, settings=settings, **memory.report())


class RecallWatch(transformers.TrainerCallback):
    """Audits every few epochs with the clock stopped, and ends training at full recall.

    A record counts when greedy decoding gives it exactly. Decoding is only run when nearly every
    record has all its tokens as the argmax, and at the end; `history` says which it was.
    """

    def __init__(self, spec: Spec, base: BaseModel, examples: list[Example]) -> None:
        self.spec, self.tokenizer, self.examples = spec, base.tokenizer, examples
        self.history: list[dict[str, Any]] = []
        self.seconds = self.audit_s = 0.0
        self.started = 0.0
        self.stopped_because = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        paused = time.perf_counter()
        self.seconds += paused - self.started
        epoch = round(state.epoch)
        limit = ""
        if epoch >= self.spec["max_epochs"]:
            limit = f"max_epochs ({self.spec['max_epochs']}) reached"
        elif self.seconds >= self.spec["cap_seconds"]:
            limit = f"cap_seconds ({self.spec['cap_seconds']:g}) reached"
        if limit or epoch % self.spec["audit_every"] == 0:
            self._audit(model, epoch, is_last=bool(limit))
            self.stopped_because = self.stopped_because or limit
            control.should_training_stop = bool(self.stopped_because)
        self.started = time.perf_counter()
        self.audit_s += self.started - paused

    def _audit(self, wrapped: Any, epoch: int, is_last: bool) -> None:
        wrapped.eval()
        model = wrapped.get_base_model()
        found = audit_examples(model, self.tokenizer, self.examples, decode="none")
        is_decoded = is_last or found.n_recalled >= DECODE_FROM * len(self.examples)
        if is_decoded:
            found = audit_examples(model, self.tokenizer, self.examples, decode="all")
        wrapped.train()
        self.history.append(
            {
                "epoch": epoch,
                "seconds": self.seconds,
                "n_recalled": found.n_recalled,
                "n_certified": found.n_certified,
                "is_decoded": is_decoded,
                "nll_nats": _finite(found.nll_nats),
            }
        )
        if is_decoded and found.n_recalled == len(self.examples):
            self.stopped_because = "recalled"
        elif self.history[-1]["nll_nats"] is None:
            self.stopped_because = "diverged"


def _trl_recall(spec: Spec) -> Measurement:
    memory = Memory()
    base = load_model(spec.get("model", EMBEDDED))
    memory.end_loading()
    examples = _examples(spec, base)
    watch = RecallWatch(spec, base, examples)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer, settings = _trainer(
            spec, base, examples, folder, num_train_epochs=spec["max_epochs"]
        )
        trainer.add_callback(watch)
        setup_s = time.perf_counter() - started
        trainer.train()
        if "save" in spec:
            trainer.model.save_pretrained(spec["save"])
    last = watch.history[-1]
    return {
        "n_records": len(examples),
        "n_recalled": last["n_recalled"],
        "n_certified": last["n_certified"],
        "is_reached": watch.stopped_because == "recalled",
        "stopped_because": watch.stopped_because,
        "seconds": watch.seconds,
        "setup_s": setup_s,
        "audit_s": watch.audit_s,
        "epochs": last["epoch"],
        **_damage_measurement(_peft_damage(trainer.model, base)),
        **memory.report(),
        "settings": settings,
        "history": watch.history,
    }


def _peft_damage(wrapped: Any, base: BaseModel) -> Damage:
    """Damage done by the adapter in a PEFT model, measured as `memlaw.write` measures its own."""

    @contextmanager
    def adapted() -> Iterator[Any]:
        wrapped.enable_adapter_layers()
        try:
            yield wrapped.get_base_model()
        finally:
            wrapped.disable_adapter_layers()

    text, name = unseen_text()
    tokens = windows(base.tokenizer, text, context=base.context_length)
    wrapped.eval()
    wrapped.disable_adapter_layers()
    return measure_damage(wrapped.get_base_model(), adapted, tokens, text_name=name, text=text)


# ---------------------------------------------------------------- memlaw


def _memlaw_step(spec: Spec) -> Measurement:
    """Steps with the defaults, or on the plain engine with the paper's recipe."""
    from memlaw.settings.train import TrainConfig
    from memlaw.train.precondition import measure_general
    from memlaw.train.preparation import make_engine, prepare
    from memlaw.train.trainer import AdapterBank

    memory = Memory()
    base = load_model()
    memory.end_loading()
    is_plain = spec["contender"] == "memlaw_plain"
    settings = dict(PAPER_RECIPE) if is_plain else {"placement": "down_proj"}
    placement = settings.pop("placement")
    config = TrainConfig(seed=spec["seed"], batch_size=BATCH, **settings)
    examples = _examples(spec, base)
    sites = resolve_sites(base.model, placement, (LAYER,))
    general = windows(base.tokenizer, retained_text(), context=base.context_length)
    learner = prepare(
        base.model,
        sites,
        examples,
        config,
        lambda: measure_general(base.model, sites, general, seed=config.seed),
    ).learner(base.model, examples, rank=spec["rank"])
    engine = make_engine(
        base.model,
        sites,
        examples,
        choice="plain" if is_plain else "cached",
        cache_mb=4096,
        logits_mb=512,
        notice=print,
    )
    bank = AdapterBank(engine, [learner])
    with _step_ends() as ends:
        while len(ends) <= spec["warm_up"] + spec["steps"]:
            bank.run_epoch()
    settings |= {"placement": placement, "rank": spec["rank"], "dtype": base.dtype}
    return _step_measurement(ends, spec, settings=settings, **memory.report())


def _memlaw_recall(spec: Spec) -> Measurement:
    """A whole `memlaw.write`, with the defaults or on the plain engine with the paper's recipe."""
    memory = Memory()
    loading: list[float] = []
    settings = {"seed": spec["seed"], "max_epochs": spec["max_epochs"]}
    if spec["contender"] == "memlaw_plain":
        settings |= PAPER_RECIPE | {"engine": "plain", "learning_rate": spec["learning_rate"]}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("memlaw.writer.run.load_model", _timed(loading, memory)),
    ):
        out = Path(folder) / "out"
        started = time.perf_counter()
        result = memlaw.write(_records(spec), out, **settings)
        wall_s = time.perf_counter() - started
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (loading_s,) = loading
    return {
        "n_records": len(result.audit.records),
        "n_recalled": result.audit.n_recalled,
        "n_certified": result.audit.n_certified,
        "is_reached": result.certified,
        "stopped_because": result.stopped_because,
        "seconds": wall_s - loading_s,
        "wall_s": wall_s,
        "loading_s": loading_s,
        "training_s": run["timings"]["training_s"],
        "epochs": result.epochs,
        "rank": result.rank,
        **_damage_measurement(result.damage),
        **memory.report(),
        "settings": settings,
    }


def _timed(loading: list[float], memory: Memory) -> Callable[..., BaseModel]:
    def load(*args: Any, **kwargs: Any) -> BaseModel:
        started = time.perf_counter()
        base = load_model(*args, **kwargs)
        loading.append(time.perf_counter() - started)
        memory.end_loading()
        return base

    return load
