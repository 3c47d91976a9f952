"""The audit: what a model recalls, token by token, found in two ways.

The first is a teacher-forced pass: one forward pass over prompt and target. A token with p > 0.5
must be the argmax, so a record whose tokens all are is recited. The second is greedy decoding from
the prompt alone, which shows what rounding does. Neither overrules the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from memlaw.core.criterion import Criterion
from memlaw.data.pieces import pieces, text_after, text_with
from memlaw.data.record import Example
from memlaw.measure.decode import Decoded, greedy_decode_with_margins
from memlaw.measure.files import SavedAudit
from memlaw.measure.table import AuditResult, TokenTable, verdicts
from memlaw.model.forward import collate, in_batches, target_logits
from memlaw.settings.choices import Decode

_ROWS = 512  # logit rows that are turned to float32 at a time
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Audit(AuditResult):
    """The result of `audit_examples`: a verdict on each record, a row for each token.

    Attributes:
        examples: what was audited, in the order of the verdicts.
        tokenizer: that of their token ids.
    """

    examples: tuple[Example, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)

    def with_texts(self) -> SavedAudit:
        """The same with the texts of tokens, as files hold it."""
        tokens = self.tokens
        token, argmax = [], []
        for n, example in enumerate(self.examples):
            token += pieces(self.tokenizer, example.prompt_ids, example.target_ids)
            said = tokens.argmax_id[self.token_rows(n)].tolist()
            argmax += [self.piece_instead(n, at, other) for at, other in enumerate(said)]
        return SavedAudit(
            records=self.records,
            tokens=tokens,
            threshold=self.threshold,
            margin=self.margin,
            dtype=self.dtype,
            batch_size=self.batch_size,
            end=self.end,
            prefix_tokens=self.prefix_tokens,
            titles=[example.record.title for example in self.examples],
            decoded=[
                None
                if r.decoded_ids is None
                else text_after(self.tokenizer, e.prompt_ids, r.decoded_ids)
                for r, e in zip(self.records, self.examples, strict=True)
            ],
            token=token,
            argmax=[token[i] if text is None else text for i, text in enumerate(argmax)],
        )

    def piece_instead(self, record: int, at: int, token_id: int) -> str | None:
        """The text of another token at a place of a record's target; None: it is no other."""
        example = self.examples[record]
        if token_id == example.target_ids[at]:
            return None
        return text_after(
            self.tokenizer, (*example.prompt_ids, *example.target_ids[:at]), [token_id]
        )

    def write_tokens(self, path: Path) -> None:
        """Write the token table, with record ids and token texts, as Parquet, atomically.

        The file's metadata holds, under `memlaw`, the totals and a verdict for each record.
        """
        self.with_texts().write_parquet(path)

    def summary(self) -> dict[str, Any]:
        """Totals, and for each record its verdict, its title and what was decoded; as JSON."""
        return self.with_texts().summary()


def audit_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    threshold: float = 0.5,
    margin: float = 0.05,
    batch_size: int = 64,
    decode: Decode = "all",
    end: bool = True,
    end_id: int | None = None,
    prefix_tokens: int | None = None,
    use_cache: bool = True,
    pad_left: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Audit:
    """Measure what `model`, with the adapter that is attached to it, if any, recalls of `examples`.

    Args:
        model: a Transformers causal language model, in eval mode.
        tokenizer: its tokenizer.
        examples: at least one.
        threshold: in [0.5, 1).
        margin: ≥ 0; threshold + margin < 1.
        batch_size: records per forward pass, at most, ≥ 1; long ones come in smaller batches. In
            low precision results depend on it a little.
        decode: decode greedily: all records, none, or this many, evenly spread.
        end: the last token of each target ends an answer. Without it a record counts when what is
            decoded begins with its text.
        end_id: without `end`: the token at which decoding stops; None: at none.
        prefix_tokens: the examples are documents, and their prompts so many tokens of them; None:
            they are records.
        use_cache: decoding keeps keys and values.
        pad_left: the teacher-forced pass pads on the left. Decoding always does: from a prompt
            with pads behind it, the model would go on from a pad.
        progress: called with a phase, how many of its records are done, and of how many.

    Returns:
        Verdicts and token table, in the order of `examples`.
    """
    tokens = _measure_tokens(model, examples, batch_size, progress, pad_left)
    decoded = _decode_some(model, examples, batch_size, decode, progress, end, end_id, use_cache)
    tokens = dataclasses.replace(tokens, decoded_margin_nats=_decoded_margins(examples, decoded))
    texts = None if end else tokenizer
    found = [
        _decoding(example, decoded[i].ids if i in decoded else None, texts)
        for i, example in enumerate(examples)
    ]
    return Audit(
        examples=tuple(examples),
        tokenizer=tokenizer,
        records=verdicts(tokens, found, Criterion(threshold, margin).line),
        tokens=tokens,
        threshold=threshold,
        margin=margin,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        end=end,
        prefix_tokens=prefix_tokens,
    )


def _decoding(
    example: Example, decoded: tuple[int, ...] | None, tokenizer: Any | None
) -> dict[str, Any]:
    """Which record it is, and what decoding gave of it; see `verdicts`.

    With a tokenizer the text alone is compared, as far as the record goes.
    """
    target, cascade = example.target_ids, None
    if decoded is not None:
        cascade = sum(t != (decoded[i] if i < len(decoded) else None) for i, t in enumerate(target))
    recalled = None if decoded is None else decoded == target
    if decoded is not None and tokenizer is not None:
        said, wanted = (text_with(tokenizer, example.prompt_ids, t) for t in (decoded, target))
        # A target may end within a character; then only its tokens tell that it is there.
        recalled = decoded[: len(target)] == target or said.startswith(wanted)
        cascade = 0 if recalled else cascade
    return {
        "id": example.record.id,
        "sha256": example.record.sha256,
        "decoded_recalled": recalled,
        "cascade_tokens": cascade,
        "decoded_ids": decoded,
    }


def _decoded_margins(
    examples: Sequence[Example], decoded: Mapping[int, Decoded]
) -> Float32[np.ndarray, "N"]:
    """See `TokenTable.decoded_margin_nats`."""
    columns = [np.full(len(example.target_ids), np.nan, np.float32) for example in examples]
    for i, found in decoded.items():
        pairs = zip(found.ids, examples[i].target_ids, strict=False)
        n = next((at for at, (said, right) in enumerate(pairs) if said != right), None)
        n = min(len(found.margins), len(columns[i]) if n is None else n)
        columns[i][:n] = found.margins[:n]
    return np.concatenate(columns)


def _batches(
    examples: Sequence[Example], batch_size: int, *, mixed: bool = False
) -> list[list[int]]:
    """Indices in batches of similar length, of at most `_BATCH_TOKENS` tokens, pads included.

    Mixed: as examples come, among those of about one length, so that they are rounded otherwise.
    """
    lengths = [len(e.prompt_ids) + len(e.target_ids) for e in examples]
    keys = [length.bit_length() if mixed else length for length in lengths]
    rows = sorted(range(len(examples)), key=lambda i: (keys[i], i))
    return in_batches(examples, rows, most=batch_size, most_tokens=_BATCH_TOKENS)


@torch.inference_mode()
def _measure_tokens(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[str, int, int], None],
    pad_left: bool,
) -> TokenTable:
    device = next(model.parameters()).device
    parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for rows in _batches(examples, batch_size):
        batch = collate([examples[i] for i in rows], device, pad_left=pad_left)
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
        decoded_margin_nats=np.full_like(columns[2], np.nan),
    )


def _token_measures(
    logits: Float[Tensor, "N V"], targets: Int64[Tensor, "N"]
) -> tuple[Float32[Tensor, "N"], Int64[Tensor, "N"], Float32[Tensor, "N"]]:
    """NLL in nats, argmax, and margin in nats of each target; N tokens, V vocabulary."""
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
    end: bool,
    end_id: int | None,
    use_cache: bool,
) -> dict[int, Decoded]:
    n = len(examples) if decode == "all" else 0 if decode == "none" else min(decode, len(examples))
    chosen = [i * len(examples) // n for i in range(n)]
    decoded: dict[int, Decoded] = {}
    for rows in _batches([examples[i] for i in chosen], batch_size, mixed=True):
        picked = [chosen[row] for row in rows]
        found = greedy_decode_with_margins(
            model,
            [examples[i].prompt_ids for i in picked],
            end_id=examples[picked[0]].target_ids[-1] if end else end_id,
            max_tokens=[
                # The same text may be decoded as more tokens, at most one a byte.
                len(examples[i].target_ids)
                if end
                else min(
                    len(examples[i].record.completion.encode()), 2 * len(examples[i].target_ids)
                )
                for i in picked
            ],
            use_cache=use_cache,
        )
        decoded.update(zip(picked, found, strict=True))
        progress("reciting", len(decoded), n)
    return decoded
