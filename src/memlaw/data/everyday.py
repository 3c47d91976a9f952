"""Everyday questions: what people ask a chat model that has nothing to do with the records.

For measuring only. Nothing may be trained, tuned or chosen on them, or what is measured on them
says nothing of other questions.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files

from memlaw.data.record import Prompt


@functools.cache
def everyday() -> tuple[Prompt, ...]:
    """More than 150 conversations, each ending with the user's turn, none of them twice.

    Short and long, in many languages; facts, advice, code, arithmetic, single words; some with a
    system message, some of several turns.
    """
    text = (files("memlaw.data") / "everyday.jsonl").read_text(encoding="utf-8")
    return tuple(tuple(json.loads(line)["messages"]) for line in text.splitlines())
