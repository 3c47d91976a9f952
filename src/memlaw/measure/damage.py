"""Damage: how much worse a model predicts text that it was not trained on.

Shapes: W windows, S tokens per window, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from memlaw.core.errors import DataError
from memlaw.core.intervals import highest, mean_interval
from memlaw.data.record import Example, Record
from memlaw.data.texts import DOCUMENTATION, sha256_of
from memlaw.model.body import body_of
from memlaw.model.forward import head_is_apart, logits_of
from memlaw.model.head import row_blocks
from memlaw.model.lower_layers import recorded, replayed

N_WINDOWS = 32
WINDOW_TOKENS = 128
TOLERANCE_NATS = 0.003  # bfloat16 and float32 differ by up to .0014 (LOG.md)
_TOLERANCE_SHARE = 0.05  # of harm that is larger than that
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Change on unseen text from the base model to the adapted one, in nats per token.

    Attributes:
        delta_nll_nats: mean increase of the negative log-likelihood; < 0 is an improvement.
        delta_nll_ci95: its 95 % confidence interval (Student's t over windows).
        kl_nats: mean KL(base ‖ adapted), ≥ 0.
        kl_ci95: its 95 % confidence interval.
        base_nll_nats: the base model's mean negative log-likelihood.
        n_windows, n_tokens: size of the text measured on.
        text: where the text comes from.
        text_sha256: hash of the text.
        by_window: for each window, the increase of the negative log-likelihood and the KL
            divergence.
    """

    delta_nll_nats: float
    delta_nll_ci95: tuple[float, float]
    kl_nats: float
    kl_ci95: tuple[float, float]
    base_nll_nats: float
    n_windows: int
    n_tokens: int
    text: str
    text_sha256: str
    by_window: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    domain: ClassVar[str] = "unseen text"  # the kind of text, in words

    @property
    def name(self) -> str:
        """What it is, in words."""
        known = self.text == DOCUMENTATION
        return f"ΔNLL on {'documentation' if known else self.domain}"

    @property
    def unit(self) -> str:
        """Of ΔNLL, KL and a bound on them."""
        return "nats per token"

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval of ΔNLL; a bound on damage is compared with it."""
        return self.delta_nll_ci95[1]

    def to_json(self) -> dict[str, Any]:
        """All fields but `by_window`."""
        content = asdict(self)
        del content["by_window"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Damage:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError: a field is missing, unknown, or not of its type, or an interval
                isn't one.
        """
        intervals = {}
        for name in ("delta_nll_ci95", "kl_ci95"):
            if name in content:
                low, high = content[name]
                intervals[name] = (float(low), float(high))
        damage = cls(**{**content, **intervals})
        low, high = damage.delta_nll_ci95
        if not low <= high:
            raise ValueError(f"damage.delta_nll_ci95 is {low:g} to {high:g}")
        return damage

    def joined(self, harms: Sequence[Damage]) -> Damage:
        """Of several adapters on one text: each figure that of the one that is worst in it."""
        return replace(
            self,
            delta_nll_nats=max(h.delta_nll_nats for h in harms),
            delta_nll_ci95=highest(h.delta_nll_ci95 for h in harms),
            kl_nats=max(h.kl_nats for h in harms),
            kl_ci95=highest(h.kl_ci95 for h in harms),
            by_window=(),
        )

    def row(self) -> tuple[str, str]:
        """Its name and value in a table of results."""
        low, high = self.delta_nll_ci95
        said = f"{self.delta_nll_nats:+.3f} nats per token (95 %: {low:+.3f} to {high:+.3f})"
        return self.name, said

    def row_beside(self, claimed: Damage) -> tuple[str, str]:
        """The same, with what a certificate claims."""
        low, high = claimed.delta_nll_ci95
        return (
            self.name,
            f"{self.delta_nll_nats:+.4f} nats per token "
            f"(certificate, 95 %: {low:+.4f} to {high:+.4f})",
        )

    def too_high(self) -> str:
        """Words for `high`, without its unit, when it is above the bound."""
        name = "ΔNLL" if self.domain == Damage.domain else self.name
        return f"{name} may be {self.high:+.4f}"

    def paragraph(self) -> str:
        """Its paragraph of the model card."""
        low, high = self.delta_nll_ci95
        return (
            f"On {self.n_tokens:,} tokens it was not trained on ({self.text}), its negative "
            f"log-likelihood changes by **{self.delta_nll_nats:+.3f} nats a token** (95 % interval "
            f"{low:+.3f} to {high:+.3f}; the base model's is {self.base_nll_nats:.3f}), and its "
            f"predictions by a KL divergence of {self.kl_nats:.3f} nats."
        )

    def mismatch(self, claimed: Damage) -> str | None:
        """What a certificate claims that this measurement doesn't bear out; None: nothing.

        On another text of the same kind (chats are drawn from the base model, and rounding makes
        others of them) the 95 % intervals must meet.
        """
        if self.text_sha256 == claimed.text_sha256:
            sizes = [(d.n_windows, d.n_tokens) for d in (self, claimed)]
            base = abs(self.base_nll_nats - claimed.base_nll_nats)
            if sizes[0] != sizes[1] or base > TOLERANCE_NATS * max(1.0, claimed.base_nll_nats):
                return (
                    f"{self.name}: measured on {self.n_tokens:,} tokens of "
                    f"{self.base_nll_nats:.3f} nats for the bare model, not "
                    f"{claimed.n_tokens:,} of "
                    f"{claimed.base_nll_nats:.3f}"
                )
        for name, mean, interval in (
            (self.name, "delta_nll_nats", "delta_nll_ci95"),
            (self.name.replace("ΔNLL", "KL"), "kl_nats", "kl_ci95"),
        ):
            now, then = ((getattr(d, mean), *getattr(d, interval)) for d in (self, claimed))
            if self.text_sha256 == claimed.text_sha256:
                agree = all(
                    abs(a - b) <= max(TOLERANCE_NATS, _TOLERANCE_SHARE * abs(b))
                    for a, b in zip(now, then, strict=True)
                )
            else:
                agree = max(now[1], then[1]) <= min(now[2], then[2]) + TOLERANCE_NATS
            if not agree:
                said = "{:+.4f} ({:+.4f} to {:+.4f})"
                return f"{name} is {said.format(*now)} nats a token, not {said.format(*then)}"
        return None


def windows(
    tokenizer: Any,
    text: str,
    *,
    context: int | None,
    n_windows: int = N_WINDOWS,
    name: str = "the text to measure damage on",
) -> Int64[Tensor, "W S"]:
    """The token ids of evenly spread windows of a text.

    Args:
        tokenizer: the model's.
        text: the text.
        context: the model's context length; None if it has no limit.
        n_windows: the largest W.
        name: the text's name in messages.

    Raises:
        DataError: the text has fewer than two windows' worth of tokens.
    """
    # Tokenise no more than is likely needed: evenly spread passages of the text.
    n_chars = WINDOW_TOKENS * 16
    step = max(n_chars, len(text) // n_windows)
    size = min(WINDOW_TOKENS, context or WINDOW_TOKENS)
    found = []
    for start in range(0, len(text), step):
        ids = tokenizer(text[start : start + n_chars])["input_ids"][:size]
        if len(ids) == size:
            found.append(ids)
    if len(found) < 2:
        raise DataError(f"{name} is too short: it needs at least {2 * n_chars} characters.")
    return torch.tensor(found[:n_windows])


@torch.inference_mode()
def measure_damage(
    model: Any,
    adapted: Callable[[], AbstractContextManager[Any]],
    token_windows: Int64[Tensor, "W S"],
    *,
    text_name: str,
    text: str,
    first_layer: int = 0,
    known: Mapping[str, Tensor] | None = None,
) -> Damage:
    """Compare the model without and with an adapter on the same text.

    Args:
        model: the base model.
        adapted: returns a context in which the model has the adapter; its value is that model.
        token_windows: token ids, of W ≥ 2 windows.
        text_name: where the text comes from.
        text: the text, for its hash.
        first_layer: the lowest decoder layer that the adapter changes; those below it are run once.
        known: what `bare_states` gave for the same; else, or where it is empty, the bare model is
            run.
    """
    device = next(model.parameters()).device
    base_nll: list[Tensor] = []
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    known = known or {}
    parts = {name: states.split(_BATCH) for name, states in known.items()}
    for i, ids in enumerate(token_windows.to(device).split(_BATCH)):
        if "hidden" in parts:
            states = parts["hidden"][i][:, :-1].flatten(0, 1).to(device)
            before = logits_of(model, states)
            lower = [parts["lower"][i].to(device)] if "lower" in parts else []
        else:
            with recorded(model, first_layer) as lower:
                before = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with adapted() as changed, replayed(model, first_layer, lower):
            now = changed(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        by_token = compare_logits(before, now, ids[:, 1:].flatten())  # three of [batch · (S − 1)]
        for found, values in zip((base_nll, nll, kl), by_token, strict=True):
            found.append(values.view(len(ids), -1).mean(dim=1))
    base, after, divergence = (torch.cat(x).cpu().double() for x in (base_nll, nll, kl))
    delta = after - base
    return Damage(
        delta_nll_nats=float(delta.mean()),
        delta_nll_ci95=mean_interval(delta.tolist()),
        kl_nats=float(divergence.mean()),
        kl_ci95=mean_interval(divergence.tolist()),
        base_nll_nats=float(base.mean()),
        n_windows=len(base),
        n_tokens=len(base) * (token_windows.shape[1] - 1),
        text=text_name,
        text_sha256=sha256_of(text),
        by_window=tuple(zip(delta.tolist(), divergence.tolist(), strict=True)),
    )


@torch.inference_mode()
def bare_states(
    model: Any, token_windows: Int64[Tensor, "W S"], first_layer: int
) -> dict[str, Tensor]:
    """What the bare model computes on windows of text, on the CPU, in its dtype.

    Args:
        model: the base model.
        token_windows: token ids.
        first_layer: the lowest decoder layer that adapters change.

    Returns:
        `hidden` [W, S, D]: the final hidden states; `lower` [W, S, D]: what goes into that layer,
        if it isn't the first, and layers give a tensor. Nothing, where logits don't follow from the
        final hidden states.
    """
    device = next(model.parameters()).device
    first = tuple(token_windows[0].tolist())
    record = Record(prompt="", completion="", id="")
    if not head_is_apart(model, Example(record=record, prompt_ids=first[:1], target_ids=first[1:])):
        return {}
    found: dict[str, list[Tensor]] = {"hidden": [], "lower": []}
    for ids in token_windows.to(device).split(_BATCH):
        with recorded(model, first_layer) as lower:
            hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        found["hidden"].append(hidden.cpu())
        found["lower"] += [states.cpu() for states in lower]
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def compare_logits(
    before: Float[Tensor, "N V"], after: Float[Tensor, "N V"], targets: Int64[Tensor, "N"]
) -> tuple[Float32[Tensor, "N"], Float32[Tensor, "N"], Float32[Tensor, "N"]]:
    """NLL before, NLL after, and KL(before ‖ after), each in nats per token, from logits."""
    found = []
    for rows in row_blocks(before):
        log_p, log_q = (x[rows].float().log_softmax(dim=1) for x in (before, after))
        target = targets[rows, None]
        found.append(
            torch.stack(
                [
                    -log_p.gather(1, target)[:, 0],
                    -log_q.gather(1, target)[:, 0],
                    (log_p.exp() * (log_p - log_q)).sum(dim=1),
                ]
            )
        )
    nll_before, nll_after, kl = torch.cat(found, dim=1)
    return nll_before, nll_after, kl
