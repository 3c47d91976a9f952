"""`write_shards`: records spread over adapters of one base, each written as `write` does.

One shard after the other, from one loaded model, or each as a Ray task: what is held in memory is
one shard's. What is finished stays: a run that was killed goes on with the shard it was in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate
from memlaw.core.commitment import PRIVATE_FOLDER, kept_key, private_folder
from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.files import (
    CERTIFICATE_FILE,
    json_sha256,
    made,
    read_json,
    require_usable,
    write_json,
    writing,
)
from memlaw.core.first_time import Stopwatch
from memlaw.core.locks import empty, locked
from memlaw.core.observer import Observer
from memlaw.core.ray_tasks import ray_tasks, require_ray
from memlaw.data.bad_rows import BadRows
from memlaw.data.record import Record
from memlaw.data.texts import general_texts
from memlaw.model.base import BaseModel, load_model
from memlaw.settings.given import settled
from memlaw.settings.write import FREE_TO_CHANGE, WriteConfig
from memlaw.shards.finishing import Shard, finish
from memlaw.shards.layout import shard_folder
from memlaw.shards.spreading import Shards, spread
from memlaw.writer.folder import CHECKPOINT_FILE, check_out, leftovers
from memlaw.writer.records import records_of, usable_records, write_skipped
from memlaw.writer.run import write_records

PLAN_FILE = f"{PRIVATE_FOLDER}/plan.json"  # of a run that isn't finished: what it was begun with


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard that is to be written: its records, into which folder, how.

    Attributes:
        name: the shard's.
        records: at least one.
        out: its folder.
        config: resolved settings.
        clock: the time that chat templates are told, ISO 8601.
    """

    name: str
    records: Sequence[Record]
    out: Path
    config: WriteConfig
    clock: str | None


Launcher = Callable[[Sequence[Job], BaseModel, Observer], Iterator[str]]  # names, as they end


@dataclass(frozen=True, kw_only=True)
class ShardsResult:
    """What `write_shards` made.

    Attributes:
        out: the folder.
        certificate: of all records.
        shards: what each shard is, by name.
        wall_s: seconds it took; of a resumed run since it was resumed.
    """

    out: Path
    certificate: Certificate
    shards: dict[str, Shard]
    wall_s: float

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.certificate.certified

    @property
    def succeeded(self) -> bool:
        """Certified, and each shard within the bounds that were asked for."""
        return all(shard.succeeded for shard in self.shards.values())


def write_shards(
    data: Any,
    out: str | Path,
    config: WriteConfig | None = None,
    *,
    shards: Shards = "auto",
    launcher: Launcher | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> ShardsResult:
    """Spread records over adapters of one base model, and certify them all.

    Args:
        data: records: a path, or Python objects; see `read_records`.
        out: a new or empty folder; or with `resume` that of an interrupted run.
        config: the settings of each shard, as of `write`; or give them by name.
        shards: how many; auto: as many as none holds more than 200 records, or 32 kB of text.
        launcher: what runs the shards; default: `run_here`; `ray_launcher` makes another.
        observer: is told of progress.
        **settings: fields of `WriteConfig`, instead of `config`.

    Raises:
        MemlawError: as for `write`. Shards that are finished are kept, and `resume` goes on.
    """
    config = settled(WriteConfig, config, settings).resolved()
    observer, out, watch = observer or Observer(), Path(out), Stopwatch()
    require_usable(out)
    bad = BadRows()
    records = records_of(data, config, bad, observer)
    if not _is_begun(out):
        leftovers(out, resume=False)  # refused before anything is made
    with locked(out, make=True):
        if not _is_begun(out):
            check_out(out, resume=False)
        return _written(records, out, config, shards, launcher, bad, observer, watch)


def _written(
    records: Sequence[Record],
    out: Path,
    config: WriteConfig,
    shards: Shards,
    launcher: Launcher | None,
    bad: BadRows,
    observer: Observer,
    watch: Stopwatch,
) -> ShardsResult:
    """`write_shards`, in a folder that is this process's."""
    base = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        tokenizer=config.tokenizer,
        notice=observer.notice,
    )
    records, clock, config = usable_records(records, base, config, bad, observer)
    parts = spread(records, shards)
    _begin(out, parts, config, base)
    jobs = [
        Job(
            name=name,
            records=part,
            out=shard_folder(out, name),
            config=dataclasses.replace(config, resume=True),
            clock=clock,
        )
        for name, part in parts.items()
    ]
    todo = [job for job in jobs if not is_finished(job.out)]
    for n, name in enumerate((launcher or run_here)(todo, base, observer), 1):
        observer.notice(f"{name} is written: {n} of {len(todo)}.")
    setting = {"asked": shards}
    certificate, found = finish(out, parts, base, config, setting, kept_key(out), watch)
    write_skipped(out, bad)
    result = ShardsResult(out=out, certificate=certificate, shards=found, wall_s=watch.wall_s)
    if result.succeeded:
        with writing(out / PLAN_FILE):
            (out / PLAN_FILE).unlink(missing_ok=True)
    return result


def is_finished(folder: Path) -> bool:
    """Whether a shard needs nothing more: certified, and within its bounds."""
    return (folder / CERTIFICATE_FILE).is_file() and not (folder / CHECKPOINT_FILE).is_file()


def run_here(jobs: Sequence[Job], base: BaseModel, observer: Observer) -> Iterator[str]:
    """Write shards one after the other, on one loaded model."""
    for job in jobs:
        observer.notice(f"{job.name}: {len(job.records):,} record(s).")
        _write_shard(job, base, observer)
        yield job.name


def ray_launcher(*, address: str | None = None, cpus: float = 2, gpus: float = 0) -> Launcher:
    """A launcher that writes each shard as a Ray task, which loads the model by itself.

    The folder, and a model or texts that are files, must be where every node sees them by the same
    path.

    Args:
        address: of a cluster, as `ray.init` takes it; default: the one this machine belongs to, or
            a new one on this machine.
        cpus, gpus: what a task claims. PyTorch gets as many threads as it has CPUs.

    Raises:
        ConfigError: Ray isn't installed.
    """
    require_ray()

    def launch(jobs: Sequence[Job], base: BaseModel, observer: Observer) -> Iterator[str]:
        todo = [(_with_whole_paths(job), base.sha256, max(1, int(cpus))) for job in jobs]
        failed: list[str] = []
        if not todo:
            return
        for number, _, error in ray_tasks(_task, todo, address=address, cpus=cpus, gpus=gpus):
            if error is None:
                yield jobs[number].name
            else:
                failed.append(f"{jobs[number].name}: {str(error).strip().splitlines()[-1]}")
        if failed:
            raise OutputError(
                f"{len(failed)} shard(s) came to nothing; --resume tries them again. "
                + " ".join(failed[:3])
            )

    return launch


def _task(job: Job, base_sha256: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    config = job.config
    base = _loaded(
        config.model, config.dtype, config.device, config.trust_remote_code, config.tokenizer
    )
    if base.sha256 != base_sha256:
        raise ConfigError(f"{config.model} is another model on this node.")
    _write_shard(job, base, Observer())


@functools.lru_cache(maxsize=1)
def _loaded(
    model: str, dtype: Any, device: str, trust_remote_code: bool, tokenizer: str | None
) -> BaseModel:
    return load_model(
        model,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
    )


def _with_whole_paths(job: Job) -> Job:
    """The same for a process that works in another folder."""
    config = job.config
    whole = {
        name: str(Path(value).absolute())
        for name in ("model", "tokenizer", "keep", "near", "retain", "damage_text", "paraphrases")
        if (value := getattr(config, name)) is not None and Path(value).exists()
    }
    config = dataclasses.replace(config, **whole)  # type: ignore[arg-type]
    return dataclasses.replace(job, config=config, out=job.out.absolute())


def _write_shard(job: Job, base: BaseModel, observer: Observer) -> None:
    with locked(job.out, make=True):
        if not (job.out / CHECKPOINT_FILE).is_file():  # of a run that came to nothing
            empty(job.out)
        check_out(job.out, resume=True)
        write_records(
            job.records,
            job.out,
            job.config,
            base=base,
            texts=general_texts(job.config.retain, job.config.damage_text),
            bad=BadRows(),
            observer=observer,
            watch=Stopwatch(),
            clock=job.clock,
        )


# ------------------------------------------------------------ what was begun


def _is_begun(out: Path) -> bool:
    return (out / PLAN_FILE).is_file()


def _begin(
    out: Path, parts: Mapping[str, Sequence[Record]], config: WriteConfig, base: BaseModel
) -> None:
    """Note what is begun; or see that it is what an interrupted run was begun with."""
    usual = {k: v for k, v in asdict(config).items() if k not in FREE_TO_CHANGE}
    plan = {
        "settings": json_sha256(usual),
        "base model": base.sha256,
        "tokenizer": base.tokenizer_sha256,
        "records in its shards": {
            name: json_sha256([record.sha256 for record in part]) for name, part in parts.items()
        },
    }
    if not _is_begun(out):
        made(out)
        private_folder(out)
        write_json(out / PLAN_FILE, plan, private=True)
        kept_key(out)
        return
    if not config.resume:
        raise OutputError(
            f"{out} already holds an unfinished run: go on with it by --resume, or name another "
            "folder."
        )
    then = read_json(out / PLAN_FILE, OutputError, "Remove the folder, and start anew.")
    if changed := sorted(name for name in plan if then.get(name) != plan[name]):
        raise ConfigError(
            f"{out} was begun with other {', other '.join(changed)}. Resume with the same settings "
            "and records, or name another folder."
        )
    with writing(out):  # it vouches for what may change now
        (out / CERTIFICATE_FILE).unlink(missing_ok=True)
