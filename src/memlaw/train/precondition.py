"""What is known before training starts: where inputs lie, and which directions general text needs.

Below the lowest adapted module everything is frozen, so second moments of what it reads, and of
the gradients that reach its output, can be measured once. They serve twice:

- *whitening*: A is trained in coordinates in which the inputs are nearly isotropic, and folded
  back at the end; the result is a plain LoRA of the same rank (source: ours);
- *retention*: a quadratic penalty on the adapter; see `retention.py`.

Shapes: n sampled positions, D_in and D_out widths of a site, R rank, M rows of a factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from memlaw.data.record import Example
from memlaw.model.body import body_of
from memlaw.model.forward import collate
from memlaw.model.head import sampled_score
from memlaw.model.sites import Site
from memlaw.train.engine import Engine
from memlaw.train.held import probing, site_reads

# Of a site: F [M, D_in] with Fᵀ F = E[xᵀ x] on general text, x what the site reads; and likewise of
# g, the gradient of sampled general text's log-likelihood at the site's output.
GeneralMoments = tuple[Float32[Tensor, "_ _"], Float32[Tensor, "_ _"]]  # sites differ in width
_MAX_POSITIONS = 4096  # of the records that are looked at, or a record more
_GENERAL_BATCH = 8


def measure_general(
    model: nn.Module, sites: Sequence[Site], general: Int64[Tensor, "W S"], *, seed: int
) -> list[GeneralMoments]:
    """Measure general text's second moments at every site of the bare model.

    Args:
        model: frozen, in eval mode, no adapter attached.
        sites: where.
        general: [W, S] int64: windows of general text.
        seed: of the tokens sampled for the Fisher.

    Returns:
        For each site the factor of what it reads, and that of the gradients at its output.
    """
    found = _general(model, sites, general.split(_GENERAL_BATCH), seed)
    return [(_factor(x), _factor(g)) for x, g in found]


def record_inputs(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[Example],
    engine: Engine | None = None,
    rows: Sequence[int] = (),
) -> list[Float32[Tensor, "n _"]]:
    """What each site of a model reads on records, so scaled that its Gram is a mean.

    Real positions only, about 4,096 of them at most.

    Args:
        model: the bare one, or with the adapter that the upper sites are to be read with.
        sites: where.
        examples: the records.
        engine: where it knows what the only site reads, the model isn't run.
        rows: of the records, among the engine's examples.

    Returns:
        [n, D_in] a site.
    """
    spread = _spread(examples)
    if engine is not None and (known := engine.reads([rows[i] for i in spread])) is not None:
        return [known]
    device = next(model.parameters()).device
    body = body_of(model)
    read: list[list[Tensor]] = [[] for _ in sites]
    chosen = [examples[i] for i in spread]
    longest = max(len(e.prompt_ids) + len(e.target_ids) for e in chosen)
    with torch.no_grad(), site_reads(model, sites) as seen:
        at_once = max(1, _MAX_POSITIONS // longest)
        for start in range(0, len(chosen), at_once):
            batch = collate(chosen[start : start + at_once], device)
            body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            real = batch.attention_mask.bool().flatten()
            for site, out in zip(sites, read, strict=True):
                x = seen[site.module].flatten(0, -2)  # some layers read [B * S, D]
                out.append(x[real].float())
    return [x / max(len(x), 1) ** 0.5 for x in (torch.cat(parts) for parts in read)]


def _spread(examples: Sequence[Example]) -> list[int]:
    """Which examples, from all over the data, have about `_MAX_POSITIONS` tokens together."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: list[int] = []
    n_tokens = 0
    for i in order:
        if n_tokens >= _MAX_POSITIONS:
            break
        chosen.append(i)
        n_tokens += len(examples[i].prompt_ids) + len(examples[i].target_ids)
    return chosen


def _general(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Int64[Tensor, "_ _"]], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Inputs [n, D_in] and output gradients [n, D_out] of each site on batches of general text."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    modules = [site.module for site in sites]
    inputs: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    for ids in batches:
        everywhere = torch.ones_like(ids, dtype=torch.bool, device=device)
        with probing(model, modules, everywhere) as (reads, probes):
            logits = model(input_ids=ids.to(device), use_cache=False).logits.flatten(0, 1)
        u = torch.rand(len(logits), generator=generator).to(device)
        logits.backward(sampled_score(logits.detach(), u))
        for i in range(len(sites)):
            inputs[i].append(reads[i].float())
            gradients[i].append(probes[i].grad)  # type: ignore[arg-type]
    return [(torch.cat(x), torch.cat(g)) for x, g in zip(inputs, gradients, strict=True)]


def _factor(samples: Float32[Tensor, "n D"]) -> Float32[Tensor, "M D"]:
    """F with Fᵀ F = the mean of xᵀ x, in as few rows as there are columns: [min(n, D), D]."""
    n, width = samples.shape
    if n <= width:
        return samples / n**0.5
    values, vectors = _eigh(samples.T @ samples / n)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, computed on the CPU: not every device can."""
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


class Whitener:
    """A symmetric map W of a site's input space; A is trained as A′ with A = W A′.

    `W ∝ (S + ε·mean(eig)·I)^(−1/2)`, S the mixture of the records' and general text's second
    moments, scaled so that the records' inputs keep their root mean square. Where fewer positions
    were sampled than the site is wide, W is held as a multiple of the identity and a part of low
    rank.

    Args:
        records_in: [n, D_in] float32: inputs on the records, scaled so that its Gram is a mean.
        general_in: [M, D_in] float32: F with Fᵀ F = E[xᵀ x] on general text.
        mixture: share of general text in S, in [0, 1].
        damping: ε > 0.
    """

    def __init__(
        self,
        records_in: Float32[Tensor, "n D_in"],
        general_in: Float32[Tensor, "M D_in"],
        *,
        mixture: float,
        damping: float,
    ) -> None:
        rows = torch.cat([records_in * (1 - mixture) ** 0.5, general_in * mixture**0.5])
        width = rows.shape[1]
        if len(rows) >= width:
            values, vectors = _eigh(rows.T @ rows)
        else:
            values, left = _eigh(rows @ rows.T)
            kept = values > values.max() * 1e-6
            values, left = values[kept], left[:, kept]
            vectors = rows.T @ left / values.sqrt()
        values = values.clamp(min=0)
        floor = damping * float(values.sum()) / width or 1.0  # where nothing was ever read
        gains, off_span = (values + floor).rsqrt(), floor**-0.5
        # W = rest·I + wide·thinᵀ; over a whole basis, W = wide alone
        self.rest, self.wide = off_span, vectors * (gains - off_span)
        self.thin: Tensor | None = vectors
        if vectors.shape[1] == width:
            self.rest, self.wide, self.thin = 0.0, (vectors * gains) @ vectors.T, None
        norm = float(self.apply(records_in.T).norm())
        scale = float(records_in.norm()) / norm if norm else 1.0
        self.rest, self.wide = self.rest * scale, self.wide * scale

    def apply(self, columns: Float32[Tensor, "D_in R"]) -> Float32[Tensor, "D_in R"]:
        """W times [D_in, R]."""
        if self.thin is None:  # W is symmetric; with the thin matrix first it takes a fifth
            return (columns.T.contiguous() @ self.wide).T
        return self.rest * columns + self.wide @ (self.thin.T @ columns)
