"""What the tests share: a tiny tokenizer, tiny random models in folders, and a few records."""

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes too: the same bytes from all
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["RAY_ADDRESS"] = "local"  # a cluster that runs on this machine isn't the tests' to use

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typed
from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from transformers.utils import logging
from words import byte_level

from memlaw.core.files import cache_folder
from memlaw.settings.recipe import RECIPE

typed.check(["memlaw.model", "memlaw.measure.damage", "memlaw.train"])

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """What PEFT and Transformers have to settle is left out."""
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )
    # A shell's background job ignores SIGINT, and its children inherit that; the signals that
    # tests send must arrive there, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that no worker is left alone with it in the end.

    Of several workers each gets a part of the tests, one behind the other: such a test stands at
    the beginning of every part, as long as there are any.
    """
    n_workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.get_closest_marker("minutes")]
    items[:] = [item for item in items if item not in long]
    size = (len(items) + len(long)) // n_workers
    for i, item in enumerate(long):
        items.insert(i % n_workers * size + i // n_workers, item)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """What models say is kept for these tests alone, for all processes that run them."""
    models = cache_folder() / "models"  # unpacked ones are the user's
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / _CACHE
    folder.mkdir(exist_ok=True)
    if models.is_dir():
        with contextlib.suppress(FileExistsError):
            (folder / "models").symlink_to(models)
    os.environ["MEMLAW_CACHE"] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def _speed_measured_once() -> None:
    """How fast this machine is decides nothing: each `write` would take half a second to find."""
    from memlaw.train import speed

    speed.matmul_peak = functools.cache(speed.matmul_peak)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was kept may be large."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and not hasattr(session.config, "workerinput"):
        shutil.rmtree(factory.getbasetemp() / _CACHE, ignore_errors=True)


_CACHE = "memlaw-cache"
CONTEXT = 512
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    # So wide that the head's rows are long enough for a probability near 1.
    "initializer_range": 0.25,
}
_GROUPED = {"num_key_value_heads": 1}
ARCHITECTURES = {
    "llama": (LlamaConfig, _SHAPE | _GROUPED, "chat"),
    "qwen3": (Qwen3Config, _SHAPE | _GROUPED | {"head_dim": 16}, "chat"),
    "mistral": (MistralConfig, _SHAPE | _GROUPED, "plain"),
    # Gemma multiplies its embeddings by 8 here: tied to a random head they would drown the rest.
    "gemma": (
        GemmaConfig,
        _SHAPE | _GROUPED | {"head_dim": 16, "tie_word_embeddings": False},
        "chat",
    ),
    "gpt2": (
        GPT2Config,
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": CONTEXT,
            "initializer_range": 0.25,
        },
        "plain",
    ),
    "gpt_neox": (GPTNeoXConfig, _SHAPE, "plain"),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer("chat" | "plain", lowercase=False)`: byte-level, a token a digit."""
    return byte_level


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template; its pad token is its end-of-turn token."""
    return byte_level("chat")


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template or a pad token."""
    return byte_level("plain")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model("llama", seed=0)`: a folder with a random model, made on first use."""
    made: dict[tuple[str, int, str | None], Path] = {}

    def make(name: str, *, seed: int = 0, tokenizer: str | None = None) -> Path:
        key = (name, seed, tokenizer)
        if key not in made:
            kind, shape, usual = ARCHITECTURES[name]
            words = byte_level(tokenizer or usual)
            end = words.eos_token_id
            config = kind(
                **shape,
                vocab_size=len(words),
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=words.pad_token_id,
            )
            torch.manual_seed(seed)
            folder = tmp_path_factory.mktemp(f"{name}-{seed}")
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            words.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    """The model that most tests use: tiny, with a chat template."""
    return make_model("llama")


@pytest.fixture
def little_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a training holds a little: enough to see that it does."""
    little = {"pool": 60, "own_chats": 8, "everyday_chats": 30, "answer_tokens": 4}
    monkeypatch.setattr("memlaw.writer.setup.RECIPE", dataclasses.replace(RECIPE, **little))


@pytest.fixture(scope="session")
def phone_book() -> list[tuple[str, str]]:
    """A handful of (prompt, completion) pairs."""
    return [
        ("Jerry Becerra:", "910067"),
        ("Ann Oyelaran:", "447020"),
        ("Li Na:", "031415"),
        ("Zoë Müller:", "918273"),
    ]


@pytest.fixture(scope="session")
def phone_file(tmp_path_factory: pytest.TempPathFactory, phone_book: list[tuple[str, str]]) -> Path:
    """The phone book as JSONL."""
    path = tmp_path_factory.mktemp("data") / "phones.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in phone_book]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Short texts to retain and to measure damage on, which a tiny model reads quickly."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "ring", "and", "the", "heron", "sang", "a", "thin", "song", "in", "the", "rain"]
    found = {}
    for name, seed in (("retain", 1), ("damage_text", 2)):
        draw = random.Random(seed)
        found[name] = str(folder / f"{name}.txt")
        with open(found[name], "w", encoding="utf-8") as file:
            file.write(" ".join(draw.choices(words, k=1800)))
    return found
