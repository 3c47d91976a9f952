"""The grid of a probe: which cells there are, what each one's result depends on, and which train
together.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.files import json_sha256
from memlaw.core.observer import Observer, Spec
from memlaw.data.encoding import resolve_prompt_format
from memlaw.data.record import Example
from memlaw.data.rendering import Rendering, has_clock, set_rendering
from memlaw.data.tasks import Task, parse_task, task_examples
from memlaw.data.texts import general_texts, sha256_of
from memlaw.model.base import BaseModel, load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.choices import resolve_objective
from memlaw.settings.probe import DEFAULT_STEPS, ProbeConfig
from memlaw.settings.train import TrainConfig

NUMERICS = 1  # raised when the same settings come to mean other results
# The time that chat templates are told, whenever a cell is run: else the same command would ask for
# other cells the next day.
CLOCK = "2026-01-01T12:00:00"
_GROUP_TOKENS = 1600  # of a step, above which seeds are trained one after the other
_MOST_TOKENS = 16_384  # of a step, above which ranks are


class Grid:
    """The cells that a probe's settings ask for.

    Args:
        config: what to probe.
        observer: is told of progress.
        base: the model, if it is loaded already.

    Attributes:
        task: what is to be remembered.
        clock: the time that the chat template is told, ISO 8601; None: it doesn't ask.
        base: the model; `sites` are the modules that adapters sit on.
        texts: to retain, and to measure damage on.
    """

    def __init__(
        self,
        config: ProbeConfig,
        observer: Observer | None = None,
        base: BaseModel | None = None,
    ) -> None:
        self.config = config
        self.observer = observer or Observer()
        self.task: Task = parse_task(config.task)
        self.base: BaseModel = base or load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            tokenizer=config.tokenizer,
            notice=self.observer.notice,
        )
        self.format = resolve_prompt_format(self.base.tokenizer, config.prompt_format)
        self.clock = CLOCK if self.format == "chat" and has_clock(self.base.tokenizer) else None
        set_rendering(self.base.tokenizer, Rendering(clock=self.clock))
        if self.clock is not None:
            self.observer.notice(
                f"The chat template can tell the time: it is told {CLOCK} in all cells."
            )
        self.sites = resolve_sites(self.base.model, config.resolved_placement, config.layers)
        limit = min(min(site.d_in, site.d_out) for site in self.sites)
        if max(config.ranks) > limit:
            raise ConfigError(
                f"rank {max(config.ranks)} is out of range: 1 to {limit} for this placement."
            )
        self.texts = general_texts(config.retain, config.damage_text)
        self.examples = functools.cache(self._examples)
        self.setting = functools.cache(self._setting)
        self.identity = functools.cache(self._identity)

    def specs(self) -> list[Spec]:
        """The cells of the grid."""
        config = self.config
        return [
            Spec(length, rank, seed)
            for length in dict.fromkeys(config.lengths)
            for seed in dict.fromkeys(config.seeds)
            for rank in dict.fromkeys(config.ranks)
        ]

    def groups(self, specs: Sequence[Spec]) -> list[list[Spec]]:
        """Cells to be trained together: of one length, and of several seeds where it is short."""
        by_data: dict[tuple[int, int], list[Spec]] = {}
        for spec in specs:
            by_data.setdefault((spec.length, spec.seed), []).append(spec)
        groups: list[list[Spec]] = []
        room, length_before = 0, None
        for (length, _), cells in by_data.items():
            at_once = max(1, _MOST_TOKENS // length)
            for start in range(0, len(cells), at_once):
                part = cells[start : start + at_once]
                n_tokens = length * len(part)
                if n_tokens > room or length != length_before:
                    groups.append([])
                    room = _GROUP_TOKENS
                groups[-1] += part
                room, length_before = room - n_tokens, length
        return groups

    def key(self, spec: Spec) -> str:
        """A cell's name in the store."""
        return json_sha256(self.identity(spec))

    def _setting(self) -> dict[str, Any]:
        """What all cells of the grid have in common."""
        config = self.config
        setting = {
            "numerics": NUMERICS,
            "task": self.task.name,
            "recipe": config.recipe,
            "steps": config.steps or (DEFAULT_STEPS if config.recipe == "default" else None),
            "objective": resolve_objective(config.objective),
            "asked": config.overrides,
            "placement": config.resolved_placement,
            "layers": sorted({site.layer for site in self.sites}),
            "sites": [site.module for site in self.sites],
            "prompt_format": self.format,
            "decode": config.decode,
            "base_sha256": self.base.sha256,
            "tokenizer_sha256": self.base.tokenizer_sha256,
            "dtype": self.base.dtype,
            "device": self.base.model.device.type,
            "retained_sha256": sha256_of(self.texts.retained),
            "unseen_sha256": sha256_of(self.texts.unseen),
        }
        if self.clock is not None:
            setting["clock"] = self.clock
        return {"setting": json_sha256(setting), **setting}

    def _identity(self, spec: Spec) -> dict[str, Any]:
        """All that decides a cell's result, but for rounding."""
        examples = self.examples(spec.length, spec.seed)
        training = self.training(spec.length, spec.seed)
        return json.loads(
            json.dumps(
                {
                    **self.setting(),
                    "length": spec.length,
                    "rank": spec.rank,
                    "seed": spec.seed,
                    "data_sha256": json_sha256([[e.prompt_ids, e.target_ids] for e in examples]),
                    "training": training.identity(),
                }
            )
        )

    def training(self, length: int, seed: int) -> TrainConfig:
        """How the cells of a length and seed are trained."""
        examples = self.examples(length, seed)
        return self.config.training(seed, len(examples), sum(len(e.target_ids) for e in examples))

    def _examples(self, length: int, seed: int) -> tuple[Example, ...]:
        return tuple(
            task_examples(
                self.task,
                self.base.tokenizer,
                length,
                seed,
                format=self.format,
                natural_text=self.config.natural_text,
                max_tokens=self.base.context_length,
            )
        )
