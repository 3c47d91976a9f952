"""The objectives by name. A new one is a class, a line here, and its name in `settings.choices`."""

from __future__ import annotations

from memlaw.settings import choices
from memlaw.train.memft import MemftCurriculum, MemftThreshold, MemftWindow, Sft
from memlaw.train.objective import Objective
from memlaw.train.triage import Triage

OBJECTIVES: dict[choices.Objective, type[Objective]] = {
    "triage": Triage,
    "sft": Sft,
    "memft_threshold": MemftThreshold,
    "memft_window": MemftWindow,
    "memft_curriculum": MemftCurriculum,
}
