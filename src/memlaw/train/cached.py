"""The fast engine: what training can't change is computed once and kept.

Below the lowest adapted module everything is frozen, so its activations are constants. They are
kept for each token that any step needs, and a step starts from them:

- the tokens that all prompts begin with (a chat template's) are run once a batch, not once a
  record: a batch is packed into one sequence in which every record attends to the shared prefix
  and to itself;
- nothing is padded, but in attention, where records of similar length lie side by side;
- several adapters' batches are packed one behind the other;
- where the lowest adapted module is the only one in its layer, and its output is simply added to
  the residual stream, that whole layer is a constant, too;
- the head runs on target positions only, and backwards only for tokens with a weight.

What is learnt and what is held are computed in the same way, dtype and layout: in 16 bits each way
rounds otherwise, in a part that all prompts have in common. Where the two differed in that, audits
failed: as far as runs show, an adapter tells them apart by it (LOG.md, 2026-11-28).

Shapes: as in `engine.py`; P prefix tokens, S packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import nn

from memlaw.data.record import Example
from memlaw.model.adapter import Adapter, add_deltas, attached
from memlaw.model.forward import head_is_apart, logits_of
from memlaw.model.head import Losses, head_losses
from memlaw.model.sites import Site, decoder_layers
from memlaw.train.activations import Activations
from memlaw.train.engine import Job, held_positions
from memlaw.train.held import BaseStates, Probed, held_losses, probing, site_reads
from memlaw.train.packed_model import PackedModel
from memlaw.train.packing import Pack

Tensor = torch.Tensor


class CachedEngine:
    """Computes what `PlainEngine` does, to the same numbers but for rounding, in less time.

    Args:
        model: frozen, in eval mode.
        sites: the modules that adapters will sit on, all of them.
        examples: what there is to learn, and what is held.
        held: rows of the held ones.
        n_alike: the first so many examples' common beginning is what packs share; default: all.
        cache_mb: activations beyond so many megabytes are kept in a temporary file.
        logits_mb: about how much memory logits may take at a time.

    Raises:
        EngineError: the model computes something else from packed records, or from cached
            activations, than from whole records one by one. `PlainEngine` is for such models.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[Site],
        examples: Sequence[Example],
        *,
        held: Sequence[int] = (),
        n_alike: int | None = None,
        cache_mb: float = 4096,
        logits_mb: float = 512,
    ) -> None:
        self.model = model
        self.sites = tuple(sites)
        self.examples = examples
        self.device = next(model.parameters()).device
        self.n_tokens = 0
        config = model.config.get_text_config()
        # Logits and their gradient, of one piece while the next one is made.
        row_bytes = 4 * config.vocab_size * model.dtype.itemsize
        self.max_logit_rows = max(1, int(logits_mb * 1e6 / row_bytes))
        self.layers: nn.ModuleList = decoder_layers(model)[1]
        self.lowest = min(site.layer for site in sites)
        self.packed = PackedModel(model, examples, n_alike)
        self.returns_tuple = False
        alone = [site.layer for site in sites].count(self.lowest) == 1  # and so the first of them
        self.folds = alone and self._site_is_added()
        # What the first layer that runs reads, without adapter; and what the adapter reads there.
        widths = [config.hidden_size] + ([sites[0].d_in] if self.folds else [])
        size = int(self.packed.packer.starts[-1])
        on_disk = size * sum(widths) * model.dtype.itemsize > cache_mb * 1e6
        self.hidden_in, *rest = (
            Activations(size, width, model.dtype, self.device, on_disk=on_disk) for width in widths
        )
        self.site_input = rest[0] if rest else None
        self.base = BaseStates(examples, held)
        self._fill_cache()
        self._check_steps(self.packed.samples)

    # ------------------------------------------------------------ the cache

    def _check_steps(self, rows: list[int]) -> None:
        """See that a shortened run with an adapter gives what a whole one gives."""
        adapter = Adapter(self.sites, rank=1, seed=0).to(self.device)
        with torch.no_grad():
            for b in adapter.b:
                b.fill_(0.1)
            try:
                found, _ = self.hidden([Job(adapter, rows)])
            except Exception as error:
                raise self.packed.unfit("cached activations") from error
            with adapter.attached(self.model):
                expected = [self.packed.whole(row) for row in rows]
                apart = head_is_apart(self.model, self.examples[rows[0]])
        if not self.packed.agree(found, expected):
            raise self.packed.unfit("cached activations")
        if not apart:
            raise self.packed.unfit("final hidden states")

    def _fill_cache(self) -> None:
        """Run the bare model once over everything, and keep what it says where steps start.

        And what it makes of the held examples, where steps end; of none, no layer above runs.
        """
        layer = self.layers[self.lowest]
        rows = iter(range(len(self.examples)))  # packs keep their order
        sites = self.sites if self.base.rows else ()
        for pack, _ in self.packed.packs([list(range(len(self.examples)))]):
            with (
                torch.no_grad(),
                suppress(_StopForward),
                _recording(layer, self.sites[0].module, self.model, stop=not sites) as seen,
                site_reads(self.model, sites) as reads,
            ):
                final = self.packed.run(pack)
            self.returns_tuple = seen["returns_tuple"]
            self.hidden_in.write(pack.places, seen["layer_out" if self.folds else "layer_in"][0])
            if self.site_input is not None:
                self.site_input.write(pack.places, seen["site_in"][0])
            at = pack.keep.nonzero()[:, 0]
            while len(at) and sites:
                row = next(rows)
                here, at = at.split([n := len(self.examples[row].target_ids), len(at) - n])
                self.base.add(
                    row, final[here], [reads[site.module].flatten(0, -2)[here] for site in sites]
                )

    def _site_is_added(self) -> bool:
        """Whether a change of the site's output changes its layer's output by just that much."""
        layer, site = self.layers[self.lowest], self.sites[0]
        module = self.model.get_submodule(site.module)
        pack = self.packed.packer.pack([[0]], self.packed.layout)
        with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
            self.packed.run(pack)
        before = seen["layer_out"]
        if before.shape[-1] != site.d_out:
            return False
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(before.shape, generator=generator).to(before) * before.float().std()
        hook = module.register_forward_hook(lambda _, __, output: output + push.to(output.dtype))
        try:
            with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
                self.packed.run(pack)
        finally:
            hook.remove()
        error = (
            (seen["layer_out"].float() - before.float()) - push.float()
        ).norm() / push.float().norm()
        return bool(error < (1e-4 if before.dtype == torch.float32 else 0.05))

    # ------------------------------------------------------------ a step

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, and the KL of what it holds, under that job's adapter."""
        hidden, targets = self.hidden(jobs)
        is_held = held_positions(self.examples, jobs, self.device)
        dense = torch.cat(
            [
                torch.full((len(self.examples[row].target_ids),), job.dense)
                for job in jobs
                for row in job.rows
            ]
        )

        def records(hidden: Tensor) -> Losses:
            return head_losses(
                self.head, hidden, targets[~is_held], dense=dense, max_rows=self.max_logit_rows
            )

        if not any(job.held for job in jobs):
            return records(hidden)
        base_hidden = self.base.at([row for job in jobs for row in job.held])
        return held_losses(
            records, self.head, hidden, is_held, base_hidden, max_rows=self.max_logit_rows
        )

    def head(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """See `Engine.head`."""
        return logits_of(self.model, hidden)

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """See `head_losses`: there and back at once, or again for what has a weight."""
        return (2 * n_targets, 0) if dense else (n_targets, 2 * n_weighted)

    def reads(self, rows: Sequence[int]) -> Float32[Tensor, "n D_in"] | None:
        """See `Engine.reads`."""
        if self.site_input is None or len(self.sites) > 1:
            return None
        packer = self.packed.packer
        starts, p = packer.starts.tolist(), packer.n_prefix
        of_rest = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
        n_sharing = sum(packer.shares[row] for row in rows)
        found = self.site_input.read(of_rest).float()
        if p and n_sharing:  # stands there once
            prefix = self.site_input.read(torch.arange(p)).float()
            found = torch.cat([found, n_sharing**0.5 * prefix])
        return found / (len(of_rest) + p * n_sharing) ** 0.5

    def hidden(self, jobs: Sequence[Job]) -> tuple[Float[Tensor, "N_M D"], Int64[Tensor, "N_M"]]:
        """See `Engine.hidden`."""
        found, targets = [], []
        for pack, owners in self.packed.packs([[*job.rows, *job.held] for job in jobs]):
            parts = [
                (jobs[job].adapter, length)
                for job, length in zip(owners, pack.lengths, strict=True)
            ]
            with self._shortened(pack, parts):
                found.append(self.packed.run(pack)[pack.keep])
            targets.append(pack.target_ids)
            self.n_tokens += pack.input_ids.numel()
        return torch.cat(found), torch.cat(targets)

    def probed(self, job: Job, modules: Sequence[str]) -> Probed:
        """See `Engine.probed`."""
        constant = self.sites[0].module if self.folds else ""
        above = [module for module in modules if module != constant]
        parts = []
        for pack, _ in self.packed.packs([job.rows]):
            n, probe = int(pack.keep.sum()), None
            if constant in modules:
                width = self.sites[0].d_out
                probe = torch.zeros(n, width, device=self.device, requires_grad=True)
            with (
                self._shortened(pack, [(job.adapter, 0)], probe),
                probing(self.model, above, pack.keep[None]) as (reads, probes),
            ):
                hidden = self.packed.run(pack)[pack.keep]
            if probe is not None:
                assert self.site_input is not None
                at = list(modules).index(constant)
                reads.insert(at, self.site_input.read(pack.places[pack.keep.cpu()]))
                probes.insert(at, probe)
            parts.append((hidden, reads, probes))
        return Probed.joined(parts)

    @contextmanager
    def _shortened(
        self,
        pack: Pack,
        parts: Sequence[tuple[Adapter, int]],
        probe: Float[Tensor, "N D"] | None = None,
    ) -> Iterator[None]:
        """Within the block, the model starts from the cache, and computes with the adapters.

        Args:
            pack: what is run.
            parts: its adapters, each with its number of tokens.
            probe: is added to the constant layer's output before the targets.
        """
        hidden = self.hidden_in.read(pack.places)[None]  # [1, S, D]
        skipped = self.lowest
        if self.site_input is not None:
            site_input = self.site_input.read(pack.places)[None]
            hidden = add_deltas(parts, self.sites[0].module, site_input, hidden, pack.active)
            skipped += 1
        if probe is not None:
            hidden = hidden.clone()
            hidden[0, pack.keep] = (hidden[0, pack.keep].float() + probe).to(hidden.dtype)
        usual = list(self.layers)
        for i in range(skipped):
            self.layers[i] = _Constant(hidden, self.returns_tuple)
        try:
            but = [self.sites[0].module] if self.folds else []
            with attached(self.model, parts, but=but, active=pack.active):
                yield
        finally:
            for i in range(skipped):
                self.layers[i] = usual[i]


class _Constant(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, output: Tensor, as_tuple: bool) -> None:
        super().__init__()
        self.output, self.as_tuple = output, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.output,) if self.as_tuple else self.output


class _StopForward(Exception):
    """What was to be recorded is: the rest of the pass isn't needed."""


@contextmanager
def _recording(
    layer: nn.Module, site: str, model: nn.Module, *, stop: bool = False
) -> Iterator[dict[str, Any]]:
    """Within the block, remember what a layer reads and says, and what a site in it reads.

    Stop: `_StopForward` ends a pass behind the layer.
    """
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["layer_in"] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["returns_tuple"] = isinstance(output, tuple)
        seen["layer_out"] = output[0] if isinstance(output, tuple) else output
        if stop:
            raise _StopForward

    def at_site(module: nn.Module, args: Any) -> None:
        seen["site_in"] = args[0].flatten(0, -2)[None]  # some layers give it [S, D]

    hooks = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
        model.get_submodule(site).register_forward_pre_hook(at_site),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
