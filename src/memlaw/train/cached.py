"""The fast engine: what training can't change is computed once and kept.

Below the lowest adapted module everything is frozen, so its activations are constants. They are
kept for each token that any step needs, and a step starts from them:

- the tokens that all prompts begin with (a chat template's) are run once a batch, not once a
  record: a batch is packed into one sequence in which every record attends to the shared prefix
  and to itself;
- nothing is padded, but in attention, where records of similar length lie side by side;
- several adapters' batches are packed one behind the other;
- where the adapted module's output is simply added to the residual stream, its whole layer is a
  constant, too;
- the head runs on target positions only, and backwards only for tokens with a weight.

Shapes: as in `engine.py`; P prefix tokens, S packed tokens, D width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from memlaw.data.record import Example
from memlaw.model.adapter import Adapter, add_deltas, attached
from memlaw.model.forward import collate, logits_of
from memlaw.model.head import Losses, head_losses
from memlaw.model.sites import Site, decoder_layers
from memlaw.train.activations import Activations
from memlaw.train.attention import is_replaceable, tree_attention
from memlaw.train.engine import EngineError, Job
from memlaw.train.packing import Layout, Pack, Packer, n_tokens

Tensor = torch.Tensor


class CachedEngine:
    """Computes what `PlainEngine` does, to the same numbers but for rounding, in less time.

    Args:
        model: frozen, in eval mode.
        sites: the modules that adapters will sit on, all of them.
        examples: what there is to learn.
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
        self.packer = Packer(examples, self.device, model.dtype)
        self.takes_positions = (
            "position_ids" in inspect.signature(model.base_model.forward).parameters
        )
        by_length = sorted(range(len(examples)), key=lambda row: n_tokens(examples[row]))
        some = list(dict.fromkeys(by_length[i] for i in (0, len(by_length) // 2, -1)))
        self.layout = self._find_layout(some, getattr(config, "sliding_window", None) or math.inf)
        self.returns_tuple = False
        self.folds = len(sites) == 1 and self._site_is_added()
        # What the first layer that runs reads, without adapter; and what the adapter reads there.
        widths = [config.hidden_size] + ([sites[0].d_in] if self.folds else [])
        size = int(self.packer.starts[-1])
        on_disk = size * sum(widths) * model.dtype.itemsize > cache_mb * 1e6
        self.hidden, *rest = (
            Activations(size, width, model.dtype, self.device, on_disk=on_disk) for width in widths
        )
        self.site_input = rest[0] if rest else None
        self._fill_cache()
        self._check_steps(some)

    # ------------------------------------------------------------ the cache

    def _find_layout(self, rows: list[int], window: float) -> Layout:
        """The cheapest way to pack from which this model computes the right things for `rows`."""
        with torch.no_grad():
            expected = [self._whole(row) for row in rows]
        can_pack = self.takes_positions and window >= max(n_tokens(e) for e in self.examples)
        tried: list[Layout] = []
        if can_pack and is_replaceable(self.model):
            tried.append("trees")
        if can_pack:
            tried.append("mask")
        for layout in (*tried, "alone"):
            self.layout = layout
            packs = [pack for pack, _ in self._packs([rows, rows[:1]])]
            try:
                with torch.no_grad():
                    found = torch.cat([self._run(pack)[pack.keep] for pack in packs])
            except Exception:  # whatever a model says to what it wasn't made for
                continue
            if self._agree(found, [*expected, expected[0]]):
                return layout
        raise self._unfit("packed records")

    def _check_steps(self, rows: list[int]) -> None:
        """See that a shortened run with an adapter gives what a whole one gives."""
        adapter = Adapter(self.sites, rank=1, seed=0).to(self.device)
        with torch.no_grad():
            for b in adapter.b:
                b.fill_(0.1)
            try:
                found = torch.cat([h for h, _ in self._hidden([Job(adapter, rows)])])
            except Exception as error:
                raise self._unfit("cached activations") from error
            with adapter.attached(self.model):
                expected = [self._whole(row) for row in rows]
        if not self._agree(found, expected):
            raise self._unfit("cached activations")

    def _agree(self, found: Tensor, expected: list[Tensor]) -> bool:
        """Every record's hidden states are the expected ones, but for rounding."""
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.1
        parts = found.float().split([len(e) for e in expected])
        return all(
            bool((part - e.float()).norm() <= limit * e.float().norm())
            for part, e in zip(parts, expected, strict=True)
        )

    def _unfit(self, what: str) -> EngineError:
        return EngineError(
            f"{type(self.model).__name__} computes something else from {what} than from whole "
            "records, so the cached engine can't train it."
        )

    def _whole(self, row: int) -> Tensor:
        """Final hidden states [T, D] that predict a record's targets, run as a user would."""
        example = self.examples[row]
        batch = collate([example], self.device)
        states = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        return states.last_hidden_state[0, -len(example.target_ids) - 1 : -1]

    def _fill_cache(self) -> None:
        """Run the bare model once over everything, and keep what it says where steps start."""
        layer = self.layers[self.lowest]
        for pack, _ in self._packs([list(range(len(self.examples)))]):
            with torch.no_grad(), _recording(layer, self.sites[0].module, self.model) as seen:
                self._run(pack)
            self.returns_tuple = seen["returns_tuple"]
            self.hidden.write(pack.places, seen["layer_out" if self.folds else "layer_in"][0])
            if self.site_input is not None:
                self.site_input.write(pack.places, seen["site_in"][0])

    def _site_is_added(self) -> bool:
        """Whether a change of the site's output changes its layer's output by just that much."""
        layer, site = self.layers[self.lowest], self.sites[0]
        module = self.model.get_submodule(site.module)
        pack = self.packer.pack([[0]], self.layout)
        with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
            self._run(pack)
        before = seen["layer_out"]
        if before.shape[-1] != site.d_out:
            return False
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(before.shape, generator=generator).to(before) * before.float().std()
        hook = module.register_forward_hook(lambda _, __, output: output + push.to(output.dtype))
        try:
            with torch.no_grad(), _recording(layer, site.module, self.model) as seen:
                self._run(pack)
        finally:
            hook.remove()
        error = (
            (seen["layer_out"].float() - before.float()) - push.float()
        ).norm() / push.float().norm()
        return bool(error < (1e-4 if before.dtype == torch.float32 else 0.05))

    def _packs(self, jobs: Sequence[list[int]]) -> Iterator[tuple[Pack, list[int]]]:
        """The rows of jobs in packs, and the job of each of a pack's trees."""
        for trees in self.packer.split(jobs, self.layout):
            yield (
                self.packer.pack([tree for _, tree in trees], self.layout),
                [job for job, _ in trees],
            )

    def _run(self, pack: Pack) -> Tensor:
        """Final hidden states [S, D] of a pack."""
        positions = {"position_ids": pack.position_ids} if self.takes_positions else {}
        with ExitStack() as stack:
            if self.layout == "trees":
                stack.enter_context(tree_attention(self.model, pack.trees))
            states = self.model.base_model(
                input_ids=pack.input_ids, attention_mask=pack.mask, use_cache=False, **positions
            )
        return states.last_hidden_state[0]

    # ------------------------------------------------------------ a step

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, under that job's adapter."""
        hidden, targets = zip(*self._hidden(jobs), strict=True)
        dense = [
            torch.full((len(self.examples[row].target_ids),), job.dense)
            for job in jobs
            for row in job.rows
        ]
        return head_losses(
            lambda h: logits_of(self.model, h),
            torch.cat(hidden),
            torch.cat(targets),
            dense=torch.cat(dense).to(self.device),
            max_rows=self.max_logit_rows,
        )

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """See `head_losses`: there and back at once, or again for what has a weight."""
        return (2 * n_targets, 0) if dense else (n_targets, 2 * n_weighted)

    def _hidden(self, jobs: Sequence[Job]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pack by pack, final hidden states [N, D] before the targets, and the targets [N]."""
        for pack, owners in self._packs([job.rows for job in jobs]):
            parts = [
                (jobs[job].adapter, length)
                for job, length in zip(owners, pack.lengths, strict=True)
            ]
            with self._shortened(pack, parts):
                hidden = self._run(pack)[pack.keep]
            self.n_tokens += pack.input_ids.numel()
            yield hidden, pack.target_ids

    @contextmanager
    def _shortened(self, pack: Pack, parts: Sequence[tuple[Adapter, int]]) -> Iterator[None]:
        """Within the block, the model starts from the cache, and computes with the adapters."""
        hidden = self.hidden.read(pack.places)[None]  # [1, S, D]
        skipped = self.lowest
        if self.site_input is not None:
            site_input = self.site_input.read(pack.places)[None]
            hidden = add_deltas(parts, self.sites[0].module, site_input, hidden)
            skipped += 1
        usual = list(self.layers)
        for i in range(skipped):
            self.layers[i] = _Constant(hidden, self.returns_tuple)
        try:
            if self.folds:
                yield
            else:
                with attached(self.model, parts):
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


@contextmanager
def _recording(layer: nn.Module, site: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within the block, remember what a layer reads and says, and what a site in it reads."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["layer_in"] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["returns_tuple"] = isinstance(output, tuple)
        seen["layer_out"] = output[0] if isinstance(output, tuple) else output

    def at_site(module: nn.Module, args: Any) -> None:
        seen["site_in"] = args[0]

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
