"""The commands that a page shows of a run: they give its settings again."""

import json
import shlex
from dataclasses import asdict, fields, replace

import pytest
from reporting import mixed_audit, write_audit

from memlaw.cli.parse import parse, part_of
from memlaw.cli.write import GROUPS, WriteArguments
from memlaw.report.page import render
from memlaw.report.reproduce import commands, flags
from memlaw.report.sources import read_source
from memlaw.settings.write import WriteConfig

MACHINE = {"resume": True, "device": "cuda:1", "cache_mb": 12.5, "logits_mb": 64}
CHANGED = {
    "model": "some models/it's one",
    "rank": 4,
    "max_rank": 128,
    "placement": "up_proj,down_proj",
    "layers": (3, 20),
    "engine": "plain",
    "retain": "a text.txt",
    "max_damage": 0.125,
    "max_epochs": 77,
    "dtype": "bfloat16",
    "prompt_field": "question",
    "completion_field": "answer",
    "data_format": "jsonl",
    "delimiter": ";",
    "skip_bad": True,
    "prompt_format": "plain",
    "prompt_rendering": "generation",
    "template_args": ("enable_thinking=false", "now='a b'"),
    "recite_prompt": "--- go on $HOME",
    "paraphrases": "e.jsonl",
    "damage_text": "b.txt",
    "audit_batch_size": 3,
    "trust_remote_code": True,
    "objective": "memft_curriculum",
    "on_empty": "sft",
    "curriculum_epochs": (1, 2, 3, 5),
    "threshold": 0.625,
    "margin": 0.1,
    "learning_rate": 1e-05,
    "schedule": "linear",
    "total_steps": 900,
    "betas": (0.5, 0.75),
    "batch_size": 8,
    "max_grad_norm": 2.5,
    "dropout": 0.25,
    "whiten": False,
    "whiten_mixture": 0.5,
    "whiten_damping": 0.125,
    "retention": 3000.0,
    "seed": -7,
    "near": "c.txt",
    "keep": "d.jsonl",
    "min_specificity": 0.75,
    "tokenizer": "words",
    "robust_to": ("merged-bf16", "gguf-q8_0"),
}
# What others above need at its default.
ALONE = {"specificity": False, "activated": "- [book] of $HOME"}


def _view(tmp_path, config):
    """A run with this in its `run.json`."""
    view = read_source(write_audit(mixed_audit(), tmp_path / "audit.json"))
    return replace(view, certificate={"certified": True}, run={"config": config})


def _parsed(command):
    """The settings that a shell would hand to `memlaw write`."""
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("memlaw", "write")
    return part_of(WriteConfig, parse(WriteArguments, GROUPS, name, arguments))


def _as_stored(config):
    return json.loads(json.dumps(asdict(config)))


def test_every_setting_comes_back_from_the_printed_command(tmp_path):
    config = WriteConfig(**CHANGED, **MACHINE)
    usual = WriteConfig()
    assert {
        f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)
    } == {f.name for f in fields(config)} - set(ALONE)
    command = dict(commands(_view(tmp_path, _as_stored(config))))["Make it again"]
    assert _parsed(command) == WriteConfig(**CHANGED)


@pytest.mark.parametrize("name", [*CHANGED, *ALONE])
def test_each_setting_comes_back_alone(name):
    needed = {"schedule": {"total_steps": 9}, "total_steps": {"schedule": "linear"}}
    config = WriteConfig(**{name: (CHANGED | ALONE)[name]} | needed.get(name, {}))
    given = flags(_as_stored(config))
    assert _parsed(shlex.join(["memlaw", "write", "RECORDS", "-o", "FOLDER", *given])) == config


def test_layers_may_be_one_or_all():
    for layers in ((7,), "all"):
        given = flags(_as_stored(WriteConfig(layers=layers)))
        assert _parsed(shlex.join(["memlaw", "write", "x", "-o", "y", *given])).layers == layers


def test_settings_at_their_defaults_and_those_of_the_machine_are_not_printed():
    assert flags(_as_stored(WriteConfig())) == []
    assert flags(_as_stored(WriteConfig(**MACHINE))) == []


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (None, []),
        ([], []),
        ({}, []),
        ({"rank": 8}, ["--rank", "8"]),
        ({"temperature": 3, "rank": None, "whiten": False}, ["--no-whiten"]),
    ],
)
def test_a_run_of_another_version_is_shown_with_what_is_known_of_it(config, given, tmp_path):
    (_, _, (what, command)) = commands(_view(tmp_path, config))
    assert what == "Make it again"
    assert command == shlex.join(["memlaw", "write", "RECORDS", "-o", "FOLDER", *given])
    (_, _, (_, bare)) = commands(replace(_view(tmp_path, config), run={"epochs": 3}))
    assert bare == "memlaw write RECORDS -o FOLDER"


def test_an_audit_has_no_commands(tmp_path):
    view = read_source(write_audit(mixed_audit(), tmp_path / "audit.json"))
    assert commands(view) == []
    assert "memlaw write" not in render([view], [])
