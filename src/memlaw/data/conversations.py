"""Conversations of everyday use, which training holds a model to.

For training only: what is measured are other prompts. They were written for this project: short and
long ones, several languages, with a system message or without, one turn or several.
"""

from __future__ import annotations

import importlib.resources
import json

from memlaw.data.record import Prompt


def training_conversations() -> list[Prompt]:
    """Prompts as records have them: a string, or chat messages that end with the user's."""
    file = importlib.resources.files("memlaw.data") / "conversations.json"
    found: list[Prompt] = []
    for messages in json.loads(file.read_text(encoding="utf-8")):
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        found.append(messages[0]["content"] if alone else tuple(messages))
    return found
