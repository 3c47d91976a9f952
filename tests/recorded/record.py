"""Short trainings whose numbers are held: losses, epoch by epoch, and the weights' hash.

    python tests/recorded/record.py > tests/recorded/trajectories.json

Run it again only where numbers are meant to change, and say in LOG.md why. The arithmetic is pinned
to instructions that every x86-64 has, one thread, float32, so that one machine's numbers are
another's; `arithmetic` is a hash of a computation in which nothing of this package takes part, by
which to tell a machine that computes otherwise.
"""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import memlaw
from memlaw.probe.run import probe
from memlaw.settings.probe import ProbeConfig
from memlaw.train import speed

HERE = Path(__file__).resolve().parent
BOOK = "data/book.jsonl"
TEXTS = {"retain": "data/retain.txt", "damage_text": "data/damage_text.txt"}
USUAL = {
    "specificity": False,
    "rank": 8,
    "batch_size": 3,
    "learning_rate": 2e-2,
    "retention": 1000.0,
    "max_epochs": 12,
    "dtype": "float32",
}
WRITES = {
    "sft": {"objective": "sft"},
    "sft, plain engine": {"objective": "sft", "engine": "plain"},
    "triage": {"objective": "triage"},
    "memft_threshold": {"objective": "memft_threshold", "on_empty": "sft", "max_epochs": 24},
    "memft_window": {"objective": "memft_window"},
    "memft_curriculum": {"objective": "memft_curriculum", "curriculum_epochs": (2, 4, 6, 8)},
    "growing": {"rank": "auto", "max_rank": 16, "learning_rate": 1e-9, "max_epochs": 44},
    "certified": {"learning_rate": 5e-2, "retention": 3000.0, "max_epochs": 60},
    "bounded": {"max_damage": 0.1, "learning_rate": 5e-2, "retention": 100.0, "max_epochs": 80},
    "all-linear": {"placement": "all-linear"},
    "mlp, linear, dropout": {
        "placement": "mlp",
        "whiten": False,
        "retention": 0.0,
        "schedule": "linear",
        "total_steps": 20,
        "dropout": 0.1,
    },
}
GRID = {"ranks": (1, 3), "lengths": (6, 10), "seeds": (0, 1), "steps": 12, "dtype": "float32"}
# Folders that an earlier version left unfinished, and how they were begun.
RESUMED = {
    "interrupted": {"rank": 2},
    "unfinished": {"rank": 2, "placement": "mlp", "objective": "memft_window"},
}
PROBES = {
    "noise": {"task": "noise"},
    "phonebook, triage": {"task": "phonebook", "lengths": (24,), "objective": "triage"},
    "phonebook, paper": {"task": "phonebook", "lengths": (24,), "recipe": "paper"},
}
MEASURED = ("nll", "base_nll", "min_p", "damage_nll", "n_steps", "train_flop", "certified")


def arithmetic() -> str:
    """Hash of what this machine computes from the bare model."""
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    logits = model(ids).logits
    logits.square().mean().backward()
    gradient = model.get_input_embeddings().weight.grad
    values = torch.linalg.eigvalsh(gradient.T @ gradient)
    parts = (logits, gradient, values, logits.log_softmax(-1), torch.sigmoid(logits))
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parts)).hexdigest()


def written(folder: Path, **settings: object) -> dict[str, object]:
    """What a `write` of the book ends in."""
    memlaw.write(BOOK, folder, model="model", **TEXTS, **settings)
    run = json.loads((folder / "run.json").read_text())
    return {
        "loss": [epoch["nll_nats"] for epoch in run["curve"]],
        "under": [epoch["n_under"] for epoch in run["curve"]],
        "flop": sum(epoch["flop"] for epoch in run["curve"]),
        "adapter": run["adapter"]["sha256"],
        "damage": run["results"]["damage"]["delta_nll_nats"],
        "stopped_because": run["stopped_because"],
    }


def main() -> None:
    """Train it all, and print it as JSON."""
    os.chdir(HERE)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    speed.matmul_peak = functools.cache(speed.matmul_peak)  # it isn't recorded, and takes long
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "arithmetic": arithmetic(),
            "writes": {
                name: written(folder / name, **USUAL | settings)
                for name, settings in WRITES.items()
            },
            "resumed": {},
            "probes": {},
        }
        for name, settings in RESUMED.items():
            out = shutil.copytree(Path("folders") / name, folder / name)
            found["resumed"][name] = written(out, resume=True, **USUAL | settings)
        for name, settings in PROBES.items():
            config = ProbeConfig(model="model", **TEXTS, **GRID | settings)
            rows = probe(folder / name, config).cells
            found["probes"][name] = [
                {"key": row["key"]} | {column: row[column] for column in MEASURED} for row in rows
            ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
