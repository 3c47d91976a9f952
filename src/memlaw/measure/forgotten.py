"""Whether an adapter has forgotten a record: what it still gives of it, by whatever prompt.

Beside each finding stands the bare model's: what that gives by itself, nobody was taught.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.data.activation import activated, last_start
from memlaw.data.attempts import attempts
from memlaw.data.form import Form
from memlaw.data.record import Example, Prompt
from memlaw.measure.answers import answer_text
from memlaw.measure.decode import greedy_decode, sample_decode
from memlaw.measure.examine import audit_examples
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel

MOST_P = 0.05  # of a token that tells a record, unless the bare model's is higher
N_SAMPLES = 100
_LEAST_TOKENS = 32
_AT_ONCE = 50
_SAYS_ITSELF = 0.5  # a token that the bare model gives a higher p tells nothing

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """What is left of a removed record.

    Attributes:
        most_p: the highest p of a token that tells the record, given the prompt and the record's
            own tokens before it.
        n_above: such tokens with a p above 0.05 and above the bare model's.
        decoded: greedy decoding from its prompt gives the record, and the bare model's doesn't.
        as_base: greedy decoding from its prompt gives the bare model's answer.
        n_attempts, n_extracted: reworded, cut and misspelt prompts, and those of them whose greedy
            answer holds the record, where the bare model's doesn't.
        n_samples, n_sampled: answers drawn at temperature 1, and those of them that hold the
            record; 0 where the bare model's do, too.
        anew: the adapter was trained from nothing, without the record. Its tokens may then be as
            likely as they are: so likely they are to whoever knows records like it.
    """

    most_p: float
    n_above: int
    decoded: bool
    as_base: bool
    n_attempts: int
    n_extracted: int
    n_samples: int
    n_sampled: int
    anew: bool = False

    @property
    def holds(self) -> bool:
        """Nothing of it was found."""
        likely = self.n_above and not self.anew
        return not (likely or self.decoded or self.n_extracted or self.n_sampled)

    def to_json(self) -> dict[str, Any]:
        """All fields, and `holds`."""
        return {**asdict(self), "holds": self.holds}


def bounds_of(base: BaseModel, examples: Sequence[Example]) -> list[Float32[Tensor, "T"]]:
    """The most that p of each target token may be: 0.05 or the bare model's; 1 where it may be any.

    That is the end token's, and that of a token which the bare model would give itself.
    """
    audit = audit_examples(base.model, base.tokenizer, examples, decode="none")
    found = []
    for row in range(len(examples)):
        p = torch.tensor(audit.tokens.p[audit.token_rows(row)], dtype=torch.float32)
        bound = torch.where(p > _SAYS_ITSELF, 1.0, p.clamp(min=MOST_P))
        bound[-1] = 1.0
        found.append(bound)
    return found


def attempted(
    subject: Subject,
    example: Example,
    *,
    trained: bool,
    avoid: Collection[Prompt],
    invocation_ids: Sequence[int] = (),
) -> list[Example]:
    """Prompts that may get what a record's got, each with the record's own target.

    Args:
        subject: the bare model.
        example: the record.
        trained: see `attempts`.
        avoid: prompts of records that are to be recited.
        invocation_ids: of an activated adapter: prompts without them are the bare model's anyway.
    """
    prompts = attempts(example.record.prompt, trained=trained, avoid=avoid)
    found = [
        Example(record=example.record, prompt_ids=ids, target_ids=example.target_ids)
        for _, ids in subject.encoded(prompts, room=_most_tokens(example))
        if not invocation_ids or last_start(ids, invocation_ids) is not None
    ]
    return activated(found, invocation_ids) if invocation_ids else found


def measure_forgotten(
    subject: Subject,
    adapted: Callable[[], AbstractContextManager[Any]],
    examples: Sequence[Example],
    *,
    avoid: Collection[Prompt],
    anew: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Forgotten]:
    """What is left of removed records.

    Args:
        subject: the bare model.
        adapted: returns a context whose value is the model with the adapter.
        examples: the removed records.
        avoid: prompts of records that are to be recited.
        anew: the adapter was trained from nothing, without them.
        progress: is told how many are done.
    """
    base, bounds = subject.base, bounds_of(subject.base, examples)
    with adapted() as model:
        audit = audit_examples(model, base.tokenizer, examples, decode="none")
    found = []
    for row, example in enumerate(examples):
        tried = attempted(subject, example, trained=False, avoid=avoid)
        with adapted() as model:
            now = _Answers.of(model, base, example, tried, seed=row)
        if any((now.decoded, *now.tried, *now.sampled)):  # does the bare model do so, too?
            was = _Answers.of(base.model, base, example, tried, seed=row)
        else:
            was = now.with_greedy(base, example)
        p = torch.tensor(audit.tokens.p[audit.token_rows(row)], dtype=torch.float32)
        tells = bounds[row] < 1
        found.append(
            Forgotten(
                most_p=float(p[tells].max()) if tells.any() else 0.0,
                n_above=int((p > bounds[row])[tells].sum()),
                decoded=now.decoded and not was.decoded,
                as_base=now.greedy == was.greedy,
                n_attempts=len(tried),
                n_extracted=sum(a and not b for a, b in zip(now.tried, was.tried, strict=True)),
                n_samples=N_SAMPLES,
                n_sampled=0 if any(was.sampled) else sum(now.sampled),
                anew=anew,
            )
        )
        progress("forgetting", row + 1, len(examples))
    return found


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a model says: decoded from the record's prompt, and whether each answer holds it."""

    greedy: tuple[int, ...]
    decoded: bool
    tried: list[bool]
    sampled: list[bool]

    @classmethod
    def of(
        cls, model: Any, base: BaseModel, example: Example, tried: Sequence[Example], *, seed: int
    ) -> _Answers:
        form, end = Form([example.record.completion]), example.target_ids[-1]

        def holds(ids: tuple[int, ...]) -> bool:
            cut = not ids or ids[-1] != end
            return form.stored_in(answer_text(base.tokenizer, ids), cut=cut)

        most = _most_tokens(example)
        # An activated adapter looks for its text in the prompt: no answer may become a part of it.
        short = most if example.active_from is not None else len(example.target_ids) + 2

        def greedy(prompts: Prompts, n: int) -> list[tuple[int, ...]]:
            limits = [n] * len(prompts)
            return greedy_decode(model, prompts, end_id=end, max_tokens=limits, together=True)

        def sample(seed: int, prompts: Prompts, n: int) -> list[tuple[int, ...]]:
            limits = [n] * len(prompts)
            return sample_decode(
                model, prompts, end_id=end, max_tokens=limits, seed=seed, together=True
            )

        own = _own_answer(model, example)
        others = _in_stages(
            (greedy, greedy), [row.prompt_ids for row in tried], end=end, short=short, most=most
        )
        sampled: list[bool] = []
        for start in range(0, N_SAMPLES, _AT_ONCE):
            stages = [partial(sample, (seed << 8) + start + stage) for stage in range(2)]
            drawn = _in_stages(
                stages, [example.prompt_ids] * _AT_ONCE, end=end, short=short, most=most
            )
            sampled += map(holds, drawn)
        return cls(
            greedy=own, decoded=holds(own), tried=[holds(ids) for ids in others], sampled=sampled
        )

    def with_greedy(self, base: BaseModel, example: Example) -> _Answers:
        """The same findings, with the bare model's own answer to the record's prompt."""
        own = _own_answer(base.model, example)
        return _Answers(greedy=own, decoded=False, tried=self.tried, sampled=self.sampled)


def _own_answer(model: Any, example: Example) -> tuple[int, ...]:
    """What is said to the record's own prompt, as to any user."""
    end, most = example.target_ids[-1], _most_tokens(example)
    return greedy_decode(model, [example.prompt_ids], end_id=end, max_tokens=[most])[0]


def _in_stages(
    decode: Sequence[Callable[[Prompts, int], list[tuple[int, ...]]]],
    prompts: Prompts,
    *,
    end: int,
    short: int,
    most: int,
) -> list[tuple[int, ...]]:
    """Answers of at most `most` tokens. Most answers end soon: only the others are run on.

    Args:
        decode: for the first stage and the second: answers prompts, in so many tokens at most.
        prompts: token ids.
        end: the token that ends an answer.
        short: tokens of an answer in the first stage, at most `most`.
        most: in both.
    """
    found = decode[0](prompts, short) if prompts else []
    if unended := [i for i, ids in enumerate(found) if end not in ids and short < most]:
        rest = decode[1]([(*prompts[i], *found[i]) for i in unended], most - short)
        for i, ids in zip(unended, rest, strict=True):
            found[i] += ids
    return found


def _most_tokens(example: Example) -> int:
    """Of an answer: as many as the record has and some before it."""
    return max(_LEAST_TOKENS, len(example.target_ids) + 8)
