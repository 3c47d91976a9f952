"""The audit: what a model recalls, token by token, by two witnesses.

The first witness is one forward pass over prompt and target (teacher-forced): a token with
p > 0.5 must be the argmax, so a record whose tokens all pass is recited. The second is greedy
decoding from the prompt alone, which settles what rounding does. Neither overrules the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlaw.core.files import atomic_path
from memlaw.data.record import Example
from memlaw.model.forward import collate, target_logits
from memlaw.settings.choices import Decode

Tensor = torch.Tensor
_ROWS = 512  # logit rows that are turned to float32 at a time
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """One row a target token, record after record. All arrays have the same length N.

    Attributes:
        record: [N] int64: index of the record in the audit.
        position: [N] int64: index of the token in its target, from 0.
        token_id: [N] int64: the token that belongs there.
        nll_nats: [N] float32, ≥ 0: −ln p of it, given the prompt and the true tokens before it.
        argmax_id: [N] int64: the token the model would say instead, or the same.
        margin_nats: [N] float32: its logit less the best other token's; > 0 where it wins.
    """

    record: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    nll_nats: np.ndarray
    argmax_id: np.ndarray
    margin_nats: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """[N] float32 in [0, 1]: the probability of the right token."""
        return np.exp(-self.nll_nats)

    @property
    def correct(self) -> np.ndarray:
        """[N] bool: the right token is the argmax."""
        return self.argmax_id == self.token_id


@dataclass(frozen=True, kw_only=True)
class RecordVerdict:
    """What became of one record.

    Attributes:
        id: the record's id.
        sha256: hash of its prompt and completion.
        n_tokens: target tokens, the end-of-turn token among them.
        min_p: the lowest probability of a target token.
        n_under: target tokens with p < threshold + margin.
        argmax_recalled: teacher-forced, every target token is the argmax (first witness).
        decoded_recalled: greedy decoding gave just the target (second witness); None: not run.
        first_failure: position of the first target token that isn't the argmax; None if all are.
        cascade_tokens: target tokens that greedy decoding got wrong from its first error on;
            None if not run.
        decoded_ids: what greedy decoding gave, at most as many tokens as the target has.
    """

    id: str
    sha256: str
    n_tokens: int
    min_p: float
    n_under: int
    argmax_recalled: bool
    decoded_recalled: bool | None
    first_failure: int | None
    cascade_tokens: int | None
    decoded_ids: tuple[int, ...] | None = field(repr=False)

    @property
    def certified(self) -> bool:
        """Every token is over the line, and greedy decoding gave the same tokens."""
        return self.n_under == 0 and self.decoded_recalled is True

    @property
    def passed(self) -> bool:
        """Nothing that was measured speaks against it: certified, if it was decoded."""
        return self.n_under == 0 and self.decoded_recalled is not False

    @property
    def recalled(self) -> bool:
        """Recited word for word: by decoding where that was run, else by the first witness."""
        return self.argmax_recalled if self.decoded_recalled is None else self.decoded_recalled

    @property
    def disagrees(self) -> bool:
        """The witnesses differ: rounding decides, and may decide otherwise elsewhere."""
        return self.decoded_recalled is not None and self.argmax_recalled != self.decoded_recalled


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of `audit_examples`: a verdict a record, a row a token.

    Attributes:
        examples: what was audited.
        tokenizer: what its tokens belong to.
        records: verdicts, in the order of the examples.
        tokens: the token table.
        threshold, margin: what a certified token needs: p ≥ threshold + margin.
        dtype: what the model computed in, as `bfloat16`.
        batch_size: records a forward pass, at most.
    """

    examples: tuple[Example, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)
    records: tuple[RecordVerdict, ...]
    tokens: TokenTable = field(repr=False)
    threshold: float
    margin: float
    dtype: str
    batch_size: int

    @property
    def n_certified(self) -> int:
        """Records certified."""
        return sum(r.certified for r in self.records)

    @property
    def n_recalled(self) -> int:
        """Records recited word for word."""
        return sum(r.recalled for r in self.records)

    @property
    def n_decoded(self) -> int:
        """Records that greedy decoding was run on."""
        return sum(r.decoded_recalled is not None for r in self.records)

    @property
    def certified(self) -> bool:
        """Every record is certified."""
        return self.n_certified == len(self.records)

    @property
    def passed(self) -> bool:
        """Nothing that was measured speaks against any record: certified, if all were decoded."""
        return all(r.passed for r in self.records)

    @property
    def disagreements(self) -> tuple[RecordVerdict, ...]:
        """Records on which the witnesses differ."""
        return tuple(r for r in self.records if r.disagrees)

    def token_rows(self, record: int) -> slice:
        """Where the tokens of a record, by its index, stand in the table."""
        start, stop = np.searchsorted(self.tokens.record, [record, record + 1])
        return slice(int(start), int(stop))

    @property
    def nll_nats(self) -> float:
        """Mean negative log-likelihood a target token."""
        return float(self.tokens.nll_nats.mean())

    @property
    def total_nll_bits(self) -> float:
        """Bits that it would take to tell this model all the targets."""
        return float(self.tokens.nll_nats.astype(np.float64).sum()) / math.log(2)

    def write_tokens(self, path: Path) -> None:
        """Write the token table, with record ids and token texts, as Parquet, atomically.

        The file's metadata holds, under `memlaw`, what was asked for and a verdict a record.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        tokens = self.tokens
        known = {int(t) for t in np.union1d(tokens.token_id, tokens.argmax_id)}
        text = {t: decoded_text(self.tokenizer, [t]) for t in known}
        table = pa.table(
            {
                "record": [self.records[i].id for i in tokens.record],
                "position": tokens.position,
                "token_id": tokens.token_id,
                "token": [text[int(t)] for t in tokens.token_id],
                "p": tokens.p,
                "nll_nats": tokens.nll_nats,
                "argmax_id": tokens.argmax_id,
                "argmax": [text[int(t)] for t in tokens.argmax_id],
                "margin_nats": tokens.margin_nats,
            }
        )
        summary = json.dumps(self.summary(), ensure_ascii=False)
        with atomic_path(path) as work:
            pq.write_table(table.replace_schema_metadata({"memlaw": summary}), work)

    def summary(self) -> dict[str, Any]:
        """Totals, and a verdict a record with its prompt and what was decoded; JSON-able."""
        return {
            "n_records": len(self.records),
            "n_certified": self.n_certified,
            "n_recalled": self.n_recalled,
            "n_decoded": self.n_decoded,
            "n_disagreements": len(self.disagreements),
            "n_tokens": len(self.tokens.token_id),
            "n_tokens_under": sum(r.n_under for r in self.records),
            "nll_nats": self.nll_nats,
            "threshold": self.threshold,
            "margin": self.margin,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "records": [
                {
                    "id": verdict.id,
                    "sha256": verdict.sha256,
                    "title": example.record.title,
                    "certified": verdict.certified,
                    "recalled": verdict.recalled,
                    "argmax_recalled": verdict.argmax_recalled,
                    "decoded_recalled": verdict.decoded_recalled,
                    "first_failure": verdict.first_failure,
                    "cascade_tokens": verdict.cascade_tokens,
                    "min_p": verdict.min_p,
                    "n_under": verdict.n_under,
                    "decoded": None
                    if verdict.decoded_ids is None
                    else decoded_text(self.tokenizer, verdict.decoded_ids),
                }
                for verdict, example in zip(self.records, self.examples, strict=True)
            ],
        }


def audit_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    threshold: float = 0.5,
    margin: float = 0.05,
    batch_size: int = 64,
    decode: Decode = "all",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Audit:
    """Measure what `model`, with whatever adapter is attached to it, recalls of `examples`.

    Args:
        model: a Transformers causal language model, in eval mode.
        tokenizer: its tokenizer.
        examples: at least one.
        threshold: in [0.5, 1).
        margin: ≥ 0; threshold + margin < 1.
        batch_size: records a forward pass, at most; long ones come in smaller batches. In low
            precision results depend on it a little.
        decode: run greedy decoding on all records, on none, or on so many, evenly spread.
        progress: called with a phase, how many of its records are done, and of how many.

    Returns:
        Verdicts and token table, in the order of `examples`.
    """
    tokens = _measure_tokens(model, examples, batch_size, progress)
    decoded = _decode_some(model, examples, batch_size, decode, progress)
    bounds = np.cumsum([0] + [len(e.target_ids) for e in examples])
    verdicts = tuple(
        _verdict(
            example, tokens, slice(bounds[i], bounds[i + 1]), threshold + margin, decoded.get(i)
        )
        for i, example in enumerate(examples)
    )
    return Audit(
        examples=tuple(examples),
        tokenizer=tokenizer,
        records=verdicts,
        tokens=tokens,
        threshold=threshold,
        margin=margin,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def _verdict(
    example: Example,
    tokens: TokenTable,
    rows: slice,
    needed_p: float,
    decoded: tuple[int, ...] | None,
) -> RecordVerdict:
    p, wrong = tokens.p[rows], np.flatnonzero(~tokens.correct[rows])
    target = example.target_ids
    cascade = None
    if decoded is not None:
        cascade = sum(t != (decoded[i] if i < len(decoded) else None) for i, t in enumerate(target))
    return RecordVerdict(
        id=example.record.id,
        sha256=example.record.sha256,
        n_tokens=len(target),
        min_p=float(p.min()),
        n_under=int((p < needed_p).sum()),
        argmax_recalled=len(wrong) == 0,
        decoded_recalled=None if decoded is None else decoded == target,
        first_failure=int(wrong[0]) if len(wrong) else None,
        cascade_tokens=cascade,
        decoded_ids=decoded,
    )


def _batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, of at most `_BATCH_TOKENS` tokens, pads included."""
    lengths = [len(e.prompt_ids) + len(e.target_ids) for e in examples]
    batches: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (lengths[i], i)):
        fits = batches and (len(batches[-1]) + 1) * lengths[i] <= _BATCH_TOKENS
        if fits and len(batches[-1]) < batch_size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.inference_mode()
def _measure_tokens(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> TokenTable:
    device = next(model.parameters()).device
    parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for rows in _batches(examples, batch_size):
        batch = collate([examples[i] for i in rows], device)
        measured = _token_measures(target_logits(model, batch), batch.target_ids)
        ends = np.cumsum([len(examples[i].target_ids) for i in rows])[:-1]
        split = [np.split(column.cpu().numpy(), ends) for column in measured]
        for place, i in enumerate(rows):
            parts[i] = (split[0][place], split[1][place], split[2][place])
        progress("reading", len(parts), len(examples))
    columns = [np.concatenate([parts[i][c] for i in range(len(examples))]) for c in range(3)]
    lengths = [len(e.target_ids) for e in examples]
    return TokenTable(
        record=np.repeat(np.arange(len(examples)), lengths),
        position=np.concatenate([np.arange(n) for n in lengths]),
        token_id=np.concatenate([np.array(e.target_ids, dtype=np.int64) for e in examples]),
        nll_nats=columns[0],
        argmax_id=columns[1],
        margin_nats=columns[2],
    )


def _token_measures(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, argmax and margin, each [N], from logits [N, V] of any dtype."""
    nll, best, margin = [], [], []
    for rows, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        rows = rows.float()  # as generate does before it takes the argmax
        chosen = rows.gather(1, target[:, None])[:, 0]
        nll.append(torch.logsumexp(rows, dim=-1) - chosen)
        best.append(rows.argmax(dim=-1))
        rivals = rows.scatter(1, target[:, None], -torch.inf)
        margin.append(chosen - rivals.amax(dim=-1))
    return torch.cat(nll).clamp(min=0.0), torch.cat(best), torch.cat(margin)


def _decode_some(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    decode: Decode,
    progress: Callable[[str, int, int], None],
) -> dict[int, tuple[int, ...]]:
    n = len(examples) if decode == "all" else 0 if decode == "none" else min(decode, len(examples))
    chosen = [i * len(examples) // n for i in range(n)]
    decoded: dict[int, tuple[int, ...]] = {}
    for rows in _batches([examples[i] for i in chosen], batch_size):
        picked = [chosen[row] for row in rows]
        found = greedy_decode(
            model,
            [examples[i].prompt_ids for i in picked],
            end_id=examples[picked[0]].target_ids[-1],
            max_tokens=[len(examples[i].target_ids) for i in picked],
        )
        decoded.update(zip(picked, found, strict=True))
        progress("reciting", len(decoded), n)
    return decoded


@torch.inference_mode()
def greedy_decode(
    model: Any, prompts: Sequence[Sequence[int]], *, end_id: int, max_tokens: Sequence[int]
) -> list[tuple[int, ...]]:
    """Plain greedy decoding by Transformers' `generate`, prompts padded on the left.

    The model's own generation defaults (sampling, penalties) are set aside.

    Args:
        model: a Transformers causal language model.
        prompts: B token sequences.
        end_id: the token to stop at.
        max_tokens: B limits.

    Returns:
        For each prompt what was generated, the end token included if it came within the limit.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), end_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    # The slice of the last position is not contiguous, and for that PyTorch would copy the whole
    # head once a row.
    head = model.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(_contiguous)] if head is not None else []
    usual = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max(max_tokens), eos_token_id=end_id, pad_token_id=end_id
    )
    try:
        out = model.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
        )
    finally:
        for hook in hooks:
            hook.remove()
        model.generation_config = usual
    return [
        _until(row, end_id, limit)
        for row, limit in zip(out[:, width:].tolist(), max_tokens, strict=True)
    ]


def _contiguous(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def decoded_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as exactly the text they stand for, special tokens included."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _until(ids: list[int], end_id: int, limit: int) -> tuple[int, ...]:
    ids = ids[:limit]
    return tuple(ids[: ids.index(end_id) + 1] if end_id in ids else ids)
