"""Prompts by which somebody may try to get what a record's prompt got: reworded, cut, misspelt.

Two sets of them: those that a training sees, and those that it is measured with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from memlaw.data.near_misses import near_misses
from memlaw.data.record import Message, Prompt

N_ATTEMPTS = 20
_MEASURED = (
    "Tell me: {}",
    "What comes after this? {}",
    "{} Please answer exactly.",
    "Do you remember? {}",
    "I have forgotten it. {}",
    "Repeat what you were taught: {}",
    "{} I know that you know it.",
    "Answer with nothing else. {}",
)
_TRAINED = ("Please say: {}", "Once more: {}", "{} Thank you.", "Recite what follows: {}")
_CUT = (0.95, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the text that are left
_CUT_TRAINED = (0.9, 0.65, 0.45)
_WRONG = {"dropped": 0.25, "swapped": 0.25, "misspelt": 0.3, "case": 0.2}


def attempts(prompt: Prompt, *, trained: bool, avoid: Collection[Prompt] = ()) -> list[Prompt]:
    """Prompts that mean a record's, or nearly.

    Args:
        prompt: a record's.
        trained: those to train with, about ten; else the 20 to measure with, none of which is
            trained with.
        avoid: prompts of records that are to be recited.

    Returns:
        None of them twice, nor `prompt` itself. Of a very short prompt there are fewer.
    """
    taken = {repr(prompt), *map(repr, avoid)}

    def new(candidates: list[Prompt]) -> list[Prompt]:
        found = []
        for candidate in candidates:
            if repr(candidate) not in taken:
                taken.add(repr(candidate))
                found.append(candidate)
        return found

    measured = new(_made(prompt, _MEASURED, _CUT, 30, seed=1))[:N_ATTEMPTS]
    return new(_made(prompt, _TRAINED, _CUT_TRAINED, 6, seed=2)) if trained else measured


def _made(
    prompt: Prompt, frames: tuple[str, ...], cuts: tuple[float, ...], n_wrong: int, *, seed: int
) -> list[Prompt]:
    changes: list[Callable[[str], str]] = [frame.format for frame in frames]
    changes += [functools.partial(_cut, share=share) for share in cuts]
    made = [_changed(prompt, change) for change in changes]
    return made + [near.prompt for near in near_misses([prompt], n_wrong, seed=seed, kinds=_WRONG)]


def _cut(text: str, share: float) -> str:
    return text[: max(1, int(len(text) * share))].rstrip() or text


def _changed(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """A prompt whose text is changed; of a chat, the text of the user's last message."""
    if isinstance(prompt, str):
        return change(prompt)
    messages: list[Message] = list(prompt)
    for i in reversed(range(len(messages))):
        content = messages[i].get("content")
        if messages[i].get("role") == "user" and isinstance(content, str) and content:
            messages[i] = {**messages[i], "content": change(content)}
            break
    return tuple(messages)
