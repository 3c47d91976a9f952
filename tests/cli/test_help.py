"""The help of each command: which options come first, that all are explained, what it costs."""

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from tyro.conf import Suppress

from memlaw import cli
from memlaw.cli import (
    ask,
    audit,
    bench,
    diff,
    export,
    fit,
    log,
    parse,
    plan,
    probe,
    push,
    report,
    revert,
    sign,
    update,
    verify,
    write,
)
from memlaw.report.make import FORMATS

COMMANDS = {
    "write": (write.WriteArguments, write.GROUPS),
    "audit": (audit.AuditArguments, audit.GROUPS),
    "diff": (diff.DiffArguments, diff.GROUPS),
    "update": (update.UpdateArguments, update.GROUPS),
    "log": (log.LogArguments, log.GROUPS),
    "revert": (revert.RevertArguments, revert.GROUPS),
    "ask": (ask.AskArguments, ask.GROUPS),
    "export": (export.ExportArguments, export.GROUPS),
    "push": (push.PushArguments, push.GROUPS),
    "sign": (sign.SignArguments, sign.GROUPS),
    "verify": (verify.VerifyArguments, verify.GROUPS),
    "report": (report.ReportArguments, report.GROUPS),
    "probe": (probe.ProbeArguments, probe.GROUPS),
    "bench objectives": (bench.BenchObjectivesArguments, bench.GROUPS),
    "fit": (fit.FitArguments, fit.GROUPS),
    "plan": (plan.PlanArguments, plan.GROUPS),
}
POSITIONAL = {
    "write": ["data"],
    "audit": ["data"],
    "diff": ["out", "data"],
    "update": ["out", "data"],
    "log": ["out"],
    "revert": ["out"],
    "ask": ["adapter", "prompt"],
    "export": ["adapter", "data"],
    "push": ["folder", "repo"],
    "sign": ["folder"],
    "verify": ["folder"],
    "report": ["paths"],
    "probe": [],
    "bench": [],
    "fit": ["runs"],
    "plan": ["runs"],
}


def _help(command, monkeypatch):
    """What the help prints to what isn't a terminal: no frames."""
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as leaving:
        cli.run([*command.split(), "--help"])
    assert leaving.value.code == 0
    return said.getvalue()


def _sections(text):
    """Heading: the options under it, without their dashes, `-` as `_`."""
    found = {}
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.startswith(" ---"):
            found[line.strip().removesuffix(" options")] = names = []
        elif option := re.match(r" +(?:-[a-z].*?)?--([a-z][a-z-]*)", line):
            names.append(option[1].replace("-", "_"))
    return found


def test_every_command_is_here():
    from memlaw.cli.dispatch import COMMANDS as known

    assert {name.split()[0] for name in COMMANDS} == set(known)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_one_group_of_the_help(command, monkeypatch):
    kind, groups = COMMANDS[command]
    shown = _sections(_help(command, monkeypatch))
    hints = get_type_hints(kind, include_extras=True)
    hidden = {name for name, hint in hints.items() if get_args(Suppress[int])[1] in get_args(hint)}
    positional = POSITIONAL[command.split()[0]]
    options = [f.name for f in fields(kind) if f.name not in (*positional, *hidden)]
    order = [*groups, *(["more"] if "more" in shown else [])]
    assert shown.pop("positional arguments", []) == []
    assert shown.pop("options") == ["help"]
    assert list(shown) == order
    assert {name: tuple(shown[name]) for name in groups} == groups
    assert sorted(name for names in shown.values() for name in names) == sorted(options)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_groups_hold_about_a_dozen_options(command):
    kind, groups = COMMANDS[command]
    everything = parse.all_groups(kind, groups)
    n_first = sum(len(names) for names in groups.values())
    n_all = sum(len(names) for names in everything.values())
    assert n_first <= 14
    assert n_first >= 10 or n_first == n_all
    assert "more" not in groups


@pytest.mark.parametrize("groups", [{"data": ("teapot",)}, {"a": ("rank",), "b": ("rank",)}])
def test_a_group_of_what_is_no_option_is_refused(groups):
    with pytest.raises(ValueError, match="not an option, or in two groups: "):
        parse.all_groups(write.WriteArguments, groups)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    kind, _ = COMMANDS[command]
    texts = parse.help_texts(kind)
    assert set(texts) == {f.name for f in fields(kind)}
    for text in texts.values():
        assert text[0] != " "
        assert text.endswith((".", "?"))
        assert "nats a token" not in text


def test_formats_of_a_report_are_those_of_the_report():
    hint = get_type_hints(report.ReportArguments)["format"]
    assert get_args(hint) == FORMATS


def test_forms_of_the_law_are_those_of_the_law():
    from memlaw.law.forms import FORMS

    assert set(get_args(get_type_hints(fit.FitArguments)["form"])) == set(FORMS)


@pytest.mark.parametrize("last", ["--help", "--learning-rte=1", "--config=absent.toml"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_parse_errors_cost_no_torch(command, last):
    script = (
        "import json, sys\n"
        "from memlaw.cli.dispatch import run\n"
        "try:\n"
        f"    status = run([*{command.split()!r}, {last!r}])\n"
        "except SystemExit as leaving:\n"
        "    status = leaving.code\n"
        "print(json.dumps([status, *sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    status, *modules = json.loads(done.stdout.splitlines()[-1])
    assert status == (0 if last == "--help" else 2)
    assert not {name.partition(".")[0] for name in modules} & {
        *("torch", "transformers", "peft", "tokenizers", "numpy", "scipy", "pyarrow", "altair"),
    }
