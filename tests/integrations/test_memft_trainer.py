"""MemFT in a trainer: a step is the same however it is divided, and as in the paper."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="the extra trl is not installed")

from stepping import RECORDS, adapter_of, build, reference_step

from memlaw.core.errors import ConfigError
from memlaw.integrations.trained import training_rows

pytestmark = pytest.mark.slow


def _threshold(nll, correct, threshold=0.5):
    return (nll >= -math.log(threshold)).float()


def _window(nll, correct):
    """The published numbers, written out: sharpness 10, 50 tokens, decay 20, far weight 0.01."""
    weights = 1 / (1 + torch.exp(-10 * (nll - math.log(2))))
    wrong = [t for t, right in enumerate(correct.tolist()) if not right]
    for t in range(len(nll)):
        if wrong and t >= wrong[0]:
            behind = t - wrong[0]
            weights[t] *= math.exp(-behind / 20) if behind < 50 else 0.01
    return weights


WEIGHTS = {"memft_threshold": _threshold, "memft_window": _window}


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    return training_rows(RECORDS, chat_tokenizer)


@pytest.fixture
def make_trainer(llama, tmp_path):
    """`make_trainer(kind, rows, …)`; see `stepping.build`."""
    return lambda kind, rows, **settings: build(kind, llama, tmp_path / "out", rows, **settings)


def _step(trainer):
    """Train a step; its logged loss and the weights after it."""
    trainer.train()
    return trainer.state.log_history[0]["loss"], adapter_of(trainer)


def _same(found, expected, tolerance=2e-5):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", list(WEIGHTS))
@pytest.mark.parametrize("kind", ["trl", "plain"])
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_is_that_of_the_plain_loss_however_it_is_divided(
    make_trainer, rows, kind, objective, size, accumulate
):
    trainer = make_trainer(
        kind, rows, size=size, accumulate=accumulate, objective=objective, threshold=0.5
    )
    before = adapter_of(trainer)
    expected = reference_step(trainer, rows, WEIGHTS[objective])
    loss, after = _step(trainer)
    assert loss == pytest.approx(expected.loss, rel=1e-4)
    _same(after, expected.after)
    moved = max(float((expected.after[n] - before[n]).abs().max()) for n in before)
    assert moved > 1e-3  # far more than the tolerance
    counts = [float(w.sum()) for w in expected.weights]
    assert max(counts) > 1.2 * min(counts)  # a mean of micro-batches' means would be another


def test_a_trl_without_its_fused_head_makes_the_same_step_of_logits(
    make_trainer, rows, monkeypatch
):
    from memlaw.integrations.trl import MemFTTrainer

    monkeypatch.setattr(MemFTTrainer, "fused", False)
    trainer = make_trainer(
        "trl", rows, size=4, accumulate=2, objective="memft_window", threshold=0.5
    )
    expected = reference_step(trainer, rows, _window)
    asked = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(sorted(kwargs)), with_kwargs=True
    )
    loss, after = _step(trainer)
    assert loss == pytest.approx(expected.loss, rel=1e-4)
    _same(after, expected.after)
    assert asked
    assert not any({"labels", "fused_lm_head"} & set(names) for names in asked)


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2)])
@pytest.mark.parametrize(
    "how",
    [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 160}],
    ids=["padding-free", "packed"],
)
def test_packed_rows_are_the_records_one_by_one(make_trainer, rows, how, size, accumulate):
    if "packing" in how:
        size, accumulate = (8, 1) if accumulate == 1 else (1, 8)
    trainer = make_trainer(
        "trl",
        rows,
        size=size,
        accumulate=accumulate,
        objective="memft_window",
        threshold=0.5,
        **how,
    )
    expected = reference_step(trainer, rows, _window)
    loss, after = _step(trainer)
    assert loss == pytest.approx(expected.loss, rel=1e-3)
    _same(after, expected.after, 1e-4)


def test_mixed_precision_changes_no_more_than_rounding(make_trainer, rows):
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        trainer = make_trainer(
            "trl", rows, size=size, accumulate=accumulate, bf16=True, threshold=0.5
        )
        exact = reference_step(trainer, rows, _threshold)
        rounded = reference_step(trainer, rows, _threshold, autocast=True)
        found.append(_step(trainer))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
    assert found[0][0] == pytest.approx(rounded.loss, rel=1e-2)
    _same(found[0][1], found[1][1], 2e-3)
    _same(found[0][1], exact.after, 1e-2)


FEW = 1e-5  # so that only some of the tokens are under it


@pytest.mark.parametrize("kind", ["trl", "plain"])
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
def test_tokens_without_weight_change_nothing(make_trainer, rows, kind, size, accumulate):
    weigh = functools.partial(_threshold, threshold=FEW)
    trainer = make_trainer(kind, rows, size=size, accumulate=accumulate, threshold=FEW)
    expected = reference_step(trainer, rows, weigh)
    share = float(torch.cat(expected.weights).mean())
    assert 0 < share < 0.6
    loss, after = _step(trainer)
    assert loss == pytest.approx(expected.loss, rel=1e-4)
    _same(after, expected.after)
    assert trainer.state.log_history[0]["share_weighted"] == pytest.approx(share, abs=1e-4)


def test_nothing_is_paid_for_tokens_without_weight(make_trainer, rows, monkeypatch):
    """On the way back the head is run for those with a weight alone."""
    import trl.trainer.utils as inside

    usual, sizes = inside._ChunkedLogProbFunction, []

    class Counted(usual):
        @staticmethod
        def backward(ctx, *args):
            sizes.append(len(ctx.saved_tensors[0]))
            return usual.backward(ctx, *args)

    monkeypatch.setattr(inside, "_ChunkedLogProbFunction", Counted)
    trainer = make_trainer("trl", rows, threshold=FEW)
    expected = reference_step(trainer, rows, functools.partial(_threshold, threshold=FEW))
    _step(trainer)
    n_weighted, n_all = int(torch.cat(expected.weights).sum()), len(torch.cat(expected.weights))
    assert sizes
    assert n_weighted <= sizes[0] <= n_weighted + 1 < n_all


@pytest.mark.parametrize("kind", ["trl", "plain"])
def test_a_step_with_nothing_left_to_learn_moves_nothing(make_trainer, rows, kind):
    trainer = make_trainer(
        kind, rows, threshold=1e-30, optim="adamw_torch", weight_decay=0.1, max_grad_norm=1.0
    )
    before = adapter_of(trainer)
    loss, after = _step(trainer)
    assert loss == 0.0
    for name, value in before.items():
        assert torch.equal(after[name], value)


def test_a_process_without_a_target_token_takes_part_in_the_step(make_trainer, rows):
    empty = {**rows[0], "labels": [-100] * len(rows[0]["labels"])}
    trainer = make_trainer("plain", [*rows[:7], empty], size=1, accumulate=8, threshold=0.5)
    expected = reference_step(trainer, rows[:7], _threshold)
    _same(_step(trainer)[1], expected.after)


def test_sft_is_the_trainers_own_loss(make_trainer, rows):
    trainer = make_trainer("trl", rows, objective="sft", size=4, accumulate=2)
    expected = reference_step(trainer, rows, lambda nll, correct: torch.ones_like(nll))
    _same(_step(trainer)[1], expected.after)


LONG = [(f"Text {i}:", str(3 ** (170 + i))[: 70 + i]) for i in range(8)]


def test_two_processes_of_four_are_one_of_eight(llama, chat_tokenizer, tmp_path):
    """Twelve steps of the window, whose patience is a record's, whichever process sees it.

    Records as rows, joined into one row without pads, and packed two to a row.
    """
    rows = training_rows(LONG, chat_tokenizer)
    longest = max(len(row["input_ids"]) for row in rows)
    usual = {"objective": "memft_window", "threshold": 0.5, "max_steps": 12, "learning_rate": 1e-3}
    packing = {"packing": True, "max_length": 2 * longest}  # two records to a row
    ways = {  # settings, and rows to a batch
        "rows": (usual, 8),
        "padding-free": (usual | {"padding_free": True}, 8),
        "packed": (usual | packing, 4),
    }
    expected = {}
    for name, (settings, size) in ways.items():
        alone = build("trl", llama, tmp_path / "one", rows, size=size, **settings)
        assert len(alone.train_dataset) == size
        _, expected[name] = _step(alone)
    impatient = build("trl", llama, tmp_path / "no", rows, **usual)
    impatient._share_patience = lambda: None
    _, other = _step(impatient)
    halves = {name: (rows, how | {"size": size // 2}) for name, (how, size) in ways.items()}
    given = {"folder": str(llama), "out": str(tmp_path), "runs": halves}
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--main_process_port=0", str(Path(__file__).with_name("two_processes.py"))]
    done = subprocess.run(
        [*command, str(tmp_path / "given.json")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},  # its own --cpu starts one process
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, after in expected.items():
        _same(load_file(tmp_path / f"{name}.safetensors"), after, 1e-5)
        _same(after, expected["rows"], 1e-4)
    apart = max(float((other[n] - expected["rows"][n]).abs().max()) for n in other)
    assert apart > 1e-4  # patience is seen


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "triage"}, "memlaw write"),
        ({"objective": "teapot"}, "no objective"),
        ({"threshold": 1.0}, "threshold 1"),
        ({"loss_type": "dft"}, "loss_type 'dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"compute_loss_func": lambda *args, **kwargs: None}, "compute_loss_func"),
    ],
)
def test_another_loss_beside_memfts_is_refused(make_trainer, rows, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_trainer("trl", rows, **settings)


def test_evaluation_is_the_trainers_own(make_trainer, rows):
    trainer = make_trainer("plain", rows, objective="memft_threshold", threshold=1e-30)
    found = trainer.evaluate(rows)
    expected = reference_step(trainer, rows, lambda nll, correct: torch.ones_like(nll))
    assert found["eval_loss"] == pytest.approx(expected.loss, rel=1e-4)
