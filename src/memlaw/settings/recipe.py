"""How `write` holds a model to what it was while it learns records: all constants in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The constants of a training that leaves other answers as they were.

    The loss of a step is the records' plus, all times `push`:

    - retention: a quadratic form that approximates KL(base ‖ adapted) on general text, on what the
      base model writes itself, and on its own chats; from the first step on.
    - From the epoch on whose mean loss is under `start_nats`: the KL at the first answer position
      of near misses, drawn anew for each step; the KL on the first answer tokens of conversations,
      drawn likewise; and a quadratic form that stands for all near misses at once.

    What is audited and saved is the running mean of the weights. The first time that all records
    are over the line in it, steps become smaller, and training goes on for a while. When all are
    safe there, well over the line, `push` rises: what is safe under a higher `push` changes less
    elsewhere. When it is over, a gate parts near misses from the records.

    Attributes:
        depths: where the adapters sit, as shares of the number of decoder layers.
        learning_rate: of AdamW, at its highest.
        least_rate_share: the rate falls with the loss, but not under this share of it.
        objective: how the loss weights target tokens.
        start_nats: the mean loss under which negatives join the training.
        first: what a record's first answer token weighs, once negatives are there; others weigh 1.
        pool, pool_per_record: near misses that are made, at most: in all, and for each record.
        kinds: the share of each kind of them.
        near_per_step, chats_per_step: how many are drawn for a step, in proportion to the KL that
            they showed last, in nats, plus `least_kl`.
        near, chat: weights of their mean KL.
        least_kl: nats; keeps those in play that have shown none.
        closed: weight of the quadratic form of all near misses.
        own_chats: conversations that the base model opens itself.
        everyday_chats: of those that come with the package, drawn once.
        held_chats: so many of all these are held in steps, the rest by retention alone: each costs
            a pass through the whole model before training starts. Half of their answers go on with
            tokens of completions.
        answer_tokens: of a conversation's answer, at most, that are held.
        text_windows, text_tokens: how much the base model writes itself, for retention; and of the
            text to retain so many windows.
        chat_share: what answers in conversations count in retention, beside general text and the
            model's own.
        most_positions, most_chat_positions: of each text of retention, and of conversations, that
            are looked at, drawn from all over it.
        shrinkage: how much less counts what these positions say of how the entries of what a site
            reads go together: an adapter lies where they cancel, and elsewhere they cancel less.
        retention_parts: these are dealt to so many parts, and each step looks at one of them.
        mean: what a step leaves of the running mean of the weights;
        steps: where an epoch has so many. In an update it may have fewer, which leave less each.
        look_epochs: the running mean is audited every so many epochs, once fewer than `look_share`
            of the records have a token under the line.
        stubborn: a token counts twice as much from look to look, up to `most_focus`, while its
            log-odds are not so far above the line's as the first; and half as much again, down to
            once, when they are above the second.
        tighter: `push` is multiplied by it when all records are safe, up to `most_push`;
        looser: divided by it when fewer than `enough` of them do, down to 1.
        last_rate: the learning rate is multiplied by it once all records were over the line: under
            smaller steps they are so again and again while `push` rises.
        extra, extra_warm: how long training goes on after that, as a share of the epochs until
            then; likewise in an update, which starts from what was held so.
        few: what no more than this share of the records, or one, fail in an audit is mended by
            asking more of these alone, each of them `most_mended` times;
        patience: and for so many looks `push` doesn't fall for them.
        seed: of near misses, own chats and own text.
    """

    depths: tuple[float, ...] = (20 / 30, 22 / 30, 23 / 30, 24 / 30, 26 / 30, 28 / 30)
    learning_rate: float = 1.5e-2
    least_rate_share: float = 0.3
    objective: str = "sft"
    start_nats: float = 1.6
    first: float = 5.0
    pool: int = 4000
    pool_per_record: int = 40
    kinds: Mapping[str, float] = field(default_factory=lambda: {"recombined": 0.7, "unknown": 0.3})
    near_per_step: int = 24
    chats_per_step: int = 2
    near: float = 0.4
    chat: float = 1.0
    least_kl: float = 0.02
    closed: float = 0.1
    own_chats: int = 200
    everyday_chats: int = 465
    held_chats: int = 300
    answer_tokens: int = 24
    text_windows: int = 64
    text_tokens: int = 96
    chat_share: float = 2 / 3
    most_positions: int = 6000
    most_chat_positions: int = 16000
    shrinkage: float = 0.3
    retention_parts: int = 8
    mean: float = 0.95
    steps: int = 5
    look_epochs: int = 3
    look_share: float = 0.2
    stubborn: tuple[float, float] = (0.7, 1.4)
    most_focus: float = 32.0
    tighter: float = 1.6
    most_push: float = 8.0
    looser: float = 1.25
    enough: float = 0.97
    extra: float = 0.6
    extra_warm: float = 0.1
    few: float = 0.03
    most_mended: int = 2
    patience: int = 3
    last_rate: float = 0.4
    seed: int = 1


RECIPE = Recipe()
