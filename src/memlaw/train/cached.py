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
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from memlaw.core.errors import ConfigError
from memlaw.data.records import Example
from memlaw.model.adapter import Adapter, Site, add_deltas, attached, decoder_layers
from memlaw.model.forward import collate, logits_of
from memlaw.model.head import Losses, head_losses
from memlaw.train.attention import Trees, is_replaceable, lay_out, tree_attention
from memlaw.train.engine import Engine, EngineError, Job, PlainEngine

Tensor = torch.Tensor
Tree = list[int]  # rows of the examples that share one prefix in a pack
# How records are packed: many trees a pack, attending along the trees; one tree a pack, under a
# dense mask (so attention is quadratic in the pack); or one record a pack.
Layout = Literal["trees", "mask", "alone"]
_PACK_TOKENS = {"trees": 8192, "mask": 768, "alone": 1}


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trees, one behind the other, as one sequence.

    Attributes:
        input_ids: [1, S] int64.
        position_ids: [1, S] int64: each record counts on from its prefix.
        trees: where they stand.
        mask: [1, 1, S, S], additive, in the model's dtype, if one is needed.
        keep: [S] bool: positions whose next token is a target token.
        target_ids: [N] int64.
        places: [S] int64: where the tokens' activations lie in the cache.
        lengths: how many tokens each tree has.
    """

    input_ids: Tensor
    position_ids: Tensor
    trees: Trees
    mask: Tensor | None
    keep: Tensor
    target_ids: Tensor
    places: Tensor
    lengths: list[int]


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
        self.n_prefix = shared_prefix(examples)
        self.takes_positions = (
            "position_ids" in inspect.signature(model.base_model.forward).parameters
        )
        lengths = [_length(e) - self.n_prefix for e in examples]
        self.starts = torch.tensor([0, *lengths]).cumsum(0) + self.n_prefix  # [records + 1]
        by_length = sorted(range(len(examples)), key=lambda row: _length(examples[row]))
        some = list(dict.fromkeys(by_length[i] for i in (0, len(by_length) // 2, -1)))
        self.layout = self._find_layout(some, getattr(config, "sliding_window", None) or math.inf)
        self.returns_tuple = False
        self.folds = len(sites) == 1 and self._site_is_added()
        # What the first layer that runs reads, without adapter; and what the adapter reads there.
        widths = [config.hidden_size] + ([sites[0].d_in] if self.folds else [])
        n_tokens = int(self.starts[-1])
        on_disk = n_tokens * sum(widths) * model.dtype.itemsize > cache_mb * 1e6
        self.hidden, *rest = (
            Activations(n_tokens, width, model.dtype, self.device, on_disk=on_disk)
            for width in widths
        )
        self.site_input = rest[0] if rest else None
        self._fill_cache()
        self._check_steps(some)

    # ------------------------------------------------------------ the cache

    def _find_layout(self, rows: list[int], window: float) -> Layout:
        """The cheapest way to pack from which this model computes the right things for `rows`."""
        with torch.no_grad():
            expected = [self._whole(row) for row in rows]
        can_pack = self.takes_positions and window >= max(_length(e) for e in self.examples)
        tried: list[Layout] = []
        if can_pack and is_replaceable(self.model):
            tried.append("trees")
        if can_pack:
            tried.append("mask")
        for layout in (*tried, "alone"):
            self.layout = layout
            packs = [
                self._pack([tree for _, tree in pack]) for pack in self._packs([rows, rows[:1]])
            ]
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
        for trees in self._packs([list(range(len(self.examples)))]):
            pack = self._pack([tree for _, tree in trees])
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
        pack = self._pack([[0]])
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

    # ------------------------------------------------------------ packing

    def _packs(self, jobs: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, Tree]]]:
        """Split the rows of jobs into packs of limited length: lists of (job, tree)."""
        limit = _PACK_TOKENS[self.layout]
        pack: list[tuple[int, Tree]] = []
        room = limit
        for job, rows in enumerate(jobs):
            opens = True  # a new tree is needed
            for row in rows:
                length = int(self.starts[row + 1] - self.starts[row])
                if pack and (
                    length + (self.n_prefix if opens else 0) > room
                    or (opens and self.layout != "trees")
                ):
                    yield pack
                    pack, room, opens = [], limit, True
                if opens:
                    pack.append((job, []))
                    room -= self.n_prefix
                    opens = False
                pack[-1][1].append(row)
                room -= length
        if pack:
            yield pack

    def _pack(self, trees: Sequence[Tree]) -> Pack:
        p = self.n_prefix
        ids: list[int] = []
        owner: list[int] = []  # record of each token, −1 for the prefix
        positions: list[int] = []
        keep: list[bool] = []
        targets: list[int] = []
        places: list[Tensor] = []
        lengths: list[int] = []
        for rows in trees:
            begun = len(ids)
            ids += self.examples[rows[0]].prompt_ids[:p]
            owner += [-1] * p
            positions += range(p)
            keep += [False] * p
            places.append(torch.arange(p))
            for row in rows:
                example = self.examples[row]
                rest = (example.prompt_ids + example.target_ids)[p:]
                n_targets = len(example.target_ids)
                ids += rest
                owner += [row] * len(rest)
                positions += range(p, p + len(rest))
                keep += [False] * (len(rest) - n_targets - 1) + [True] * n_targets + [False]
                targets += example.target_ids
                places.append(torch.arange(int(self.starts[row]), int(self.starts[row + 1])))
            lengths.append(len(ids) - begun)
        device = self.device
        return Pack(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            trees=lay_out(
                p,
                [[int(self.starts[r + 1] - self.starts[r]) for r in rows] for rows in trees],
                device,
            ),
            mask=_tree_mask(owner, self.model.dtype).to(device)
            if self.layout == "mask" and len(trees[0]) > 1
            else None,
            keep=torch.tensor(keep, device=device),
            target_ids=torch.tensor(targets, device=device),
            places=torch.cat(places),
            lengths=lengths,
        )

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
        for trees in self._packs([job.rows for job in jobs]):
            pack = self._pack([tree for _, tree in trees])
            parts = [
                (jobs[job].adapter, length)
                for (job, _), length in zip(trees, pack.lengths, strict=True)
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


class Activations:
    """Rows of activations, in the model's memory or in a temporary file.

    The file has no name and vanishes with the process. Of its pages, only those of the rows at
    hand stay in the process's memory.

    Args:
        n: rows.
        width: of a row.
        dtype: of its numbers.
        device: where rows are wanted.
        on_disk: keep them in a file, in the folder for temporary files.
    """

    def __init__(
        self, n: int, width: int, dtype: torch.dtype, device: torch.device, *, on_disk: bool
    ) -> None:
        self.device = device
        self.mapping: mmap.mmap | None = None
        if not on_disk:
            self.rows = torch.empty(n, width, dtype=dtype, device=device)
            return
        with tempfile.TemporaryFile(prefix="memlaw-activations-") as file:
            n_bytes = n * width * dtype.itemsize
            try:
                if hasattr(os, "posix_fallocate"):  # a disk found full later would be fatal
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    file.truncate(n_bytes)
            except OSError as error:
                raise ConfigError(
                    f"no room for {n_bytes / 1e6:,.0f} MB of activations in "
                    f"{tempfile.gettempdir()} ({error.strerror}). Name another folder in TMPDIR, "
                    "or raise --cache-mb to keep them in memory."
                ) from error
            self.mapping = mmap.mmap(file.fileno(), n_bytes)
        self.rows = torch.frombuffer(self.mapping, dtype=dtype).view(n, width)

    def read(self, places: Tensor) -> Tensor:
        """The rows at `places` [S] (on the CPU), as [S, width] on the device."""
        found = self.rows[places.to(self.rows.device)].to(self.device)
        self._let_go()
        return found

    def write(self, places: Tensor, values: Tensor) -> None:
        """Put [S, width] at `places` [S] (on the CPU)."""
        self.rows[places.to(self.rows.device)] = values.to(self.rows.device)
        self._let_go()

    def _let_go(self) -> None:
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


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


def cached_or_plain(
    model: Any,
    sites: Sequence[Site],
    examples: Sequence[Example],
    *,
    cache_mb: float,
    logits_mb: float,
    notice: Callable[[str], None],
) -> Engine:
    """The cached engine where it can train the model; else the plain one, and a notice."""
    try:
        return CachedEngine(model, sites, examples, cache_mb=cache_mb, logits_mb=logits_mb)
    except EngineError as error:
        notice(f"{error} Training on the plain engine, which is slower.")
        return PlainEngine(model, examples)


def _length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.target_ids)


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with; at least one token of each prompt is left over."""
    first = examples[0].prompt_ids
    n = min(len(e.prompt_ids) for e in examples) - 1
    for example in examples:
        while example.prompt_ids[:n] != first[:n]:
            n -= 1
    return n


def _tree_mask(owner: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S] additive mask: causal, and only within one's own record and the prefix (−1)."""
    who = torch.tensor(owner)
    order = torch.arange(len(owner))
    seen = (order[None] <= order[:, None]) & ((who[None] == who[:, None]) | (who[None] == -1))
    mask = torch.zeros(len(owner), len(owner), dtype=dtype)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
