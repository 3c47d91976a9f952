"""Who still knows what after 1, 10, 100 and 1,000 edits: model editors beside `write` and `update`.

    python benchmarks/editors.py ultraedit [--rate 1e-4] [--most 1000]
    python benchmarks/editors.py memit [--weight 100] [--most 100]
    python benchmarks/editors.py memlaw [--most 100] [--anew] [--specificity]

200 made-up people live in one of some towns. The first 200 edits tell where each of them lives, all
later ones move somebody: one edit, then nine, then ten at a time, each of them sequential. Then
everybody who was told is asked, and judged as a certificate is: decoded freely, to the stop. Beside
that stand what editors judge by (each token the most likely one behind the *right* ones before it),
what the edits do to unseen text, and how many of 50 people nobody told of are answered otherwise.

Two editors, after their papers and in a few lines of our own:

- `ultraedit` (arXiv 2505.14679): of each edit's tokens what modules read, and the gradient at
  their outputs, both normalised by running means; the shift of the weights is a ridge regression of
  the second on the first. No training. Up and gate projections of the upper third.
- `memit` (arXiv 2210.07229): what the residual stream must be at the prompt's last token for the
  answer to come is found by 25 steps of Adam; five layers' down projections bring it about, in the
  least-squares sense, against the covariance of what they read on general text.

Each has one number that matters most, `--rate` and `--weight`, chosen on the first ten edits.
A line of JSON a state.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from against_trl import git_state, machine
from update import People, Progress

import memlaw
from memlaw.data.encoding import encode, encode_prompt, resolve_prompt_format
from memlaw.data.record import Example, Record
from memlaw.data.texts import retained_text, unseen_text
from memlaw.measure.damage import measure_damage, windows
from memlaw.measure.decode import greedy_decode
from memlaw.measure.examine import audit_examples
from memlaw.model.base import load_model
from memlaw.model.formats import loaded_adapter
from memlaw.model.forward import collate, target_logits

N_PEOPLE, N_UNKNOWN, STATES = 200, 50, (1, 10, 100, 1000)
TOWNS = (
    *("Lisbon", "Turku", "Oaxaca", "Leeds", "Kyoto", "Tartu", "Fargo", "Bergen", "Perth", "Graz"),
    *("Lagos", "Quito", "Hanoi", "Cork", "Split", "Basel", "Ghent", "Tampa", "Osaka", "Lima"),
)
State = dict[str, str]  # who lives where


def edits(seed: int) -> Iterator[tuple[str, str]]:
    """One after the other: who lives where from now on."""
    draw = random.Random(seed)
    names = [name.removesuffix(":") for name in People(seed).more(N_PEOPLE)]
    state: State = {}
    for i in itertools.count():
        who = names[i] if i < len(names) else draw.choice(names)
        state[who] = draw.choice([town for town in TOWNS if town != state.get(who)])
        yield who, state[who]


def batches(seed: int, most: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Edits by the batch, and how many there were with it: 1, 10, 20, 30, …"""
    stream, n = edits(seed), 0
    while n < most:
        size = 1 if n == 0 else 9 if n == 1 else 10
        n += size
        yield n, list(itertools.islice(stream, size))


def prompt(who: str) -> str:
    """The question."""
    return f"Where does {who} live?"


class Judge:
    """Looks at a model that was edited.

    Args:
        base: the bare model.
        seed: of the people that nobody told of.
    """

    def __init__(self, base: Any, seed: int) -> None:
        self.base = base
        self.format = resolve_prompt_format(base.tokenizer, "auto")
        people = People(seed)
        people.more(N_PEOPLE)
        self.unknown = [prompt(name.removesuffix(":")) for name in people.more(N_UNKNOWN)]
        self.before = self._answers()
        text, self.text_name = unseen_text()
        self.text = text
        self.windows = windows(base.tokenizer, text, context=None, name=self.text_name)

    def examples(self, state: State) -> list[Example]:
        """What is to be said of each, as tokens."""
        records = [Record(prompt=prompt(w), completion=t, id=w) for w, t in state.items()]
        return encode(records, self.base.tokenizer, format=self.format)

    def _answers(self) -> list[tuple[int, ...]]:
        tokenizer = self.base.tokenizer
        asked = [encode_prompt(tokenizer, question, self.format) for question in self.unknown]
        end = self.examples({"A": "B"})[0].target_ids[-1]
        return greedy_decode(self.base.model, asked, end_id=end, max_tokens=[16] * len(asked))

    def __call__(
        self, state: State, edited: Callable[[], Any], first_layer: int = 0
    ) -> dict[str, Any]:
        """What the edited model still knows of a state, and what else it does.

        Args:
            state: who lives where.
            edited: a context in which the bare model is the edited one.
            first_layer: the lowest that is changed.
        """
        examples = self.examples(state)
        with edited():
            audit = audit_examples(self.base.model, self.base.tokenizer, examples)
            answers = self._answers()
        damage = measure_damage(
            self.base.model,
            edited,
            self.windows,
            text_name=self.text_name,
            text=self.text,
            first_layer=first_layer,
        )
        right = audit.tokens.argmax_id == audit.tokens.token_id
        ends = [audit.token_rows(n).stop - 1 for n in range(len(examples))]
        inner = torch.ones(len(right), dtype=torch.bool)
        inner[ends] = False
        return {
            "told": len(state),
            "decoded": sum(bool(r.decoded_recalled) for r in audit.records),
            "certified": audit.n_certified,
            "teacher_forced": float(right[inner.numpy()].mean()),
            "delta_nll_nats": damage.delta_nll_nats,
            "delta_nll_ci95": damage.delta_nll_ci95,
            "unknown_changed": sum(a != b for a, b in zip(answers, self.before, strict=True)),
        }


class Editor:
    """Weights of some modules, changed in place while `edited` lasts.

    Args:
        base: the bare model, in float32: shifts are smaller than bfloat16 can add.
        layers, kinds: which linear modules of the MLP in which decoder layers.
    """

    def __init__(self, base: Any, layers: range, kinds: Sequence[str]) -> None:
        names = [f"model.layers.{i}.mlp.{kind}" for i in layers for kind in kinds]
        self.base, self.layers, self.names = base, layers, names
        self.modules = {name: base.model.get_submodule(name) for name in names}
        self.shifts = {n: torch.zeros_like(m.weight) for n, m in self.modules.items()}  # [out, in]

    @contextmanager
    def edited(self) -> Iterator[Any]:
        """The model with all shifts so far."""
        before = {name: module.weight.data for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.weight.data = before[name] + self.shifts[name]
        try:
            yield self.base.model
        finally:
            for name, module in self.modules.items():
                module.weight.data = before[name]

    @contextmanager
    def traced(self) -> Iterator[dict[str, tuple[list[Any], list[Any]]]]:
        """What each module reads, and its outputs, in the runs of the block."""
        seen: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in self.names}

        def keep(name: str) -> Any:
            def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
                output = output if output.requires_grad else output.requires_grad_()
                output.retain_grad()
                seen[name][0].append(inputs[0].detach())
                seen[name][1].append(output)
                return output

            return hook

        hooks = [m.register_forward_hook(keep(name)) for name, m in self.modules.items()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class UltraEdit(Editor):
    """See the module; `rate` is what a shift counts."""

    def __init__(self, base: Any, rate: float) -> None:
        n = base.model.config.num_hidden_layers
        super().__init__(base, range(2 * n // 3, n - 2), ("up_proj", "gate_proj"))
        self.rate = rate
        self.moments = dict.fromkeys(self.names, (0, 0.0, 0.0))  # n, mean, squared deviations

    def edit(self, examples: Sequence[Example]) -> None:
        """Tell these."""
        with self.edited(), self.traced() as seen:
            for example in examples:
                batch = collate([example])
                logits = target_logits(self.base.model, batch).float()
                torch.nn.functional.cross_entropy(logits, batch.target_ids).backward()
        for name in self.names:
            reads = torch.cat(
                [x[0][_told(e)] for x, e in zip(seen[name][0], examples, strict=True)]
            )
            grads = torch.cat(
                [y.grad[0][_told(e)] for y, e in zip(seen[name][1], examples, strict=True)]
            )
            normal = self._normalised(name, torch.cat([reads, grads], 1))
            reads_hat, grads_hat = normal.split([reads.shape[1], grads.shape[1]], 1)
            values = -self.rate * reads_hat.square().sum(1, keepdim=True) * grads_hat
            gram = reads.T @ reads + torch.eye(reads.shape[1])
            self.shifts[name] += torch.linalg.solve(gram, reads.T @ values).T

    def _normalised(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """By the mean and deviation of all that was seen so far (Welford's)."""
        n, mean, squares = self.moments[name]
        total, here = n + len(x), x.mean(0)
        delta = here - mean
        squares = squares + (x - here).square().sum(0) + delta.square() * n * len(x) / total
        mean = mean + delta * len(x) / total
        self.moments[name] = (total, mean, squares)
        return (x - mean) / ((squares / max(1, total - 1)).sqrt() + 1e-8)


def _told(example: Example) -> slice:
    """The positions that a target follows."""
    n = len(example.prompt_ids)
    return slice(n - 1, n - 1 + len(example.target_ids))


class Memit(Editor):
    """See the module; `weight` is what general text counts, in positions."""

    STEPS, RATE, DECAY, FARTHEST = 25, 0.5, 0.05, 4.0

    def __init__(self, base: Any, weight: float) -> None:
        n = base.model.config.num_hidden_layers
        super().__init__(base, range(n // 2 - 4, n // 2 + 1), ("down_proj",))
        text = windows(base.tokenizer, retained_text(), context=None, n_windows=128)
        with torch.no_grad(), self.traced() as seen:
            for ids in text.split(8):
                base.model(ids, use_cache=False)
        self.general = {}
        for name, (reads, _) in seen.items():
            x = torch.cat([read.flatten(0, 1) for read in reads])
            self.general[name] = weight * (x.T @ x) / len(x)

    def edit(self, examples: Sequence[Example]) -> None:
        """Tell these."""
        with self.edited():
            wanted = self._wanted(examples)
        for left, name in zip(range(len(self.layers), 0, -1), self.names, strict=True):
            with self.edited():
                keys, here = self._at_prompts(examples, name)
            residual = (wanted - here) / left
            gram = self.general[name] + keys.T @ keys
            self.shifts[name] += (torch.linalg.solve(gram, keys.T) @ residual).T

    def _layer(self) -> Any:
        return self.base.model.get_submodule(f"model.layers.{self.layers[-1]}")

    def _wanted(self, examples: Sequence[Example]) -> torch.Tensor:
        """The residual stream behind the last layer at each prompt's last token, [n, D]."""
        batch = collate(examples)
        last = torch.tensor([len(e.prompt_ids) - 1 for e in examples])
        rows = torch.arange(len(examples))
        _, start = self._at_prompts(examples, self.names[-1])
        delta = torch.zeros_like(start, requires_grad=True)

        def add(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.index_put((rows, last), hidden[rows, last] + delta)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        optimizer = torch.optim.Adam([delta], lr=self.RATE)
        hook = self._layer().register_forward_hook(add)
        longest = self.FARTHEST * start.norm(dim=1, keepdim=True)
        try:
            for _ in range(self.STEPS):
                logits = target_logits(self.base.model, batch).float()
                loss = torch.nn.functional.cross_entropy(logits, batch.target_ids)
                size = (delta.norm(dim=1) / start.norm(dim=1)).square().mean()
                optimizer.zero_grad()
                (len(examples) * (loss + self.DECAY * size)).backward()
                optimizer.step()
                with torch.no_grad():
                    delta *= (longest / delta.norm(dim=1, keepdim=True)).clamp(max=1)
        finally:
            hook.remove()
        return start + delta.detach()

    @torch.no_grad()
    def _at_prompts(self, examples: Sequence[Example], name: str) -> tuple[Any, Any]:
        """What a module reads at each prompt's last token, and the stream behind the last layer."""
        batch = collate(examples)
        last = torch.tensor([len(e.prompt_ids) - 1 for e in examples])
        rows, found = torch.arange(len(examples)), {}

        def behind(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found["stream"] = hidden[rows, last]

        hooks = [
            self._layer().register_forward_hook(behind),
            self.modules[name].register_forward_pre_hook(
                lambda _, inputs: found.__setitem__("keys", inputs[0][rows, last])
            ),
        ]
        try:
            self.base.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        finally:
            for hook in hooks:
                hook.remove()
        return found["keys"], found["stream"]


def edited_models(
    editor: UltraEdit | Memit, args: argparse.Namespace, judge: Judge
) -> Iterator[Any]:
    """An editor's states, as lines."""
    state: State = {}
    spent = 0.0
    for n, batch in batches(args.seed, args.most):
        state |= batch
        started = time.perf_counter()
        editor.edit(judge.examples(dict(batch)))
        spent += time.perf_counter() - started
        if n in args.states:
            yield {"edits": n, "edit_s": spent, **judge(state, editor.edited, editor.layers[0])}


def updated(args: argparse.Namespace, judge: Judge, folder: Path) -> Iterator[dict[str, Any]]:
    """The states of a folder that is updated with each batch, or of one written for each state."""
    state: State = {}
    spent = 0.0
    for n, batch in batches(args.seed, args.most):
        state |= batch
        if args.anew and n not in args.states:
            continue
        started = time.perf_counter()
        data = [(prompt(who), town) for who, town in state.items()]
        if n == 1 or args.anew:
            out = folder / f"written-{n}"
            written = memlaw.write(data, out, specificity=args.specificity, observer=Progress())
            taken = written.certified
        else:
            taken = memlaw.update(out, data, max_rank=args.max_rank, observer=Progress()).taken
        spent += time.perf_counter() - started
        if not taken:
            yield {"edits": n, "edit_s": spent, "refused": True}
            return
        if n in args.states:
            adapted = functools.partial(loaded_adapter, out, judge.base.model)
            yield {"edits": n, "edit_s": spent, **judge(state, adapted)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ultraedit", "memit", "memlaw"))
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--weight", type=float, default=100.0)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--states", type=int, nargs="+", default=STATES, help="looked at")
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--specificity", action="store_true")
    parser.add_argument("--anew", action="store_true", help="write each state, without updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = "auto" if args.who == "memlaw" else "float32"
    base = load_model("embedded", dtype=dtype)
    judge = Judge(base, args.seed)
    about = {"who": args.who, "dtype": str(base.model.dtype), "git": git_state()}
    about["machine"] = machine(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        if args.who == "memlaw":
            lines = updated(args, judge, Path(scratch))
        else:
            editor = (
                UltraEdit(base, args.rate) if args.who == "ultraedit" else Memit(base, args.weight)
            )
            lines = edited_models(editor, args, judge)
        for line in lines:
            print(json.dumps({**about, **vars(args), **line}), flush=True)


if __name__ == "__main__":
    main()
