"""The package as a whole: what importing it costs, what it offers, what it never does."""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memlaw

MODULES = sorted(
    module.name.removeprefix("memlaw.")
    for module in pkgutil.walk_packages(memlaw.__path__, "memlaw.")
)
SOURCES = sorted(Path(memlaw.__path__[0]).rglob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "peft", "pyarrow", "scipy", "datasets", "rich", "tyro")


def _imported_by(script):
    """Names of the top-level modules that a fresh interpreter has loaded after `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script + "\nimport json, sys\nprint(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    if name == "integrations.trl":
        pytest.importorskip("trl", reason="the extra trl is not installed")
    module = importlib.import_module(f"memlaw.{name}")
    assert module.__doc__


def test_there_are_modules_to_look_at():
    assert {"cli", "data.reading", "writer", "law"} <= set(MODULES)
    assert len(SOURCES) == len(MODULES) + 1


@pytest.mark.parametrize(
    "script",
    [
        "import memlaw",
        "from memlaw.cli.dispatch import run; run(['--help'])",
        "from memlaw.cli.dispatch import run; run(['--version'])",
        "from memlaw.cli.dispatch import run; run(['teapot'])",
    ],
)
def test_help_costs_no_heavy_import(script):
    loaded = _imported_by(script)
    assert "memlaw" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.slow
def test_a_report_is_made_without_torch():
    script = "import memlaw.report.make, memlaw.report.page, memlaw.cli.report"
    loaded = _imported_by(script)
    assert "altair" in loaded
    assert not loaded & {"torch", "transformers", "peft", "tokenizers"}


def test_the_reports_template_is_in_the_package():
    from importlib import resources

    for name in ("page.html.j2", "page.css", "page.js"):
        assert (resources.files("memlaw.report") / name).is_file()


def test_records_are_read_without_torch():
    script = "import memlaw; memlaw.read_records([('a', 'b')]); memlaw.Record"
    assert not _imported_by(script) & {"torch", "transformers", "numpy"}


def test_the_public_names_are_there():
    assert set(memlaw.__all__) <= set(dir(memlaw))
    for name in memlaw.__all__:
        public = getattr(memlaw, name)
        assert public.__name__ == name
        assert public.__doc__


ROOMS = sorted(
    path.name for path in Path(memlaw.__path__[0]).iterdir() if (path / "__init__.py").is_file()
)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_offers_what_it_says(room):
    package = importlib.import_module(f"memlaw.{room}")
    assert "In:" in package.__doc__
    assert "mport" in package.__doc__  # what it may import
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")}
    source = Path(package.__file__).read_text(encoding="utf-8")
    offered = set(re.findall(r"import (\w+) as \1", source)) | set(getattr(package, "__all__", ()))
    assert offered or room == "core"  # its names are taken from its modules
    assert offered <= set(dir(package))
    assert not offered & modules  # a module of that name would take its place
    for name in offered:
        assert not inspect.ismodule(getattr(package, name))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'memlaw' has no attribute 'teapot'"):
        _ = memlaw.teapot


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert memlaw.__version__ == version("memlaw")


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="memlaw")
    assert command.value == "memlaw.cli:main"
    assert command.load() is importlib.import_module("memlaw.cli").main


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_names_pickle_or_what_unpickles(path):
    code = path.read_text(encoding="utf-8")
    for forbidden in ("import pickle", "from pickle", "pickle.load", "torch.load", "torch.save"):
        assert forbidden not in code


def test_every_error_is_a_memlaw_error_with_an_exit_status():
    from memlaw.core import errors
    from memlaw.train.learner import DivergedError

    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(kinds) > 5
    assert all(issubclass(kind, memlaw.MemlawError) for kind in kinds)
    assert {kind.exit_code for kind in kinds} == {2}
    assert DivergedError.exit_code == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memlaw.write([("a", "b")], "out", learning_rte=1), "learning_rte"),
        (lambda: memlaw.audit([("a", "b")], dcode=1), "dcode"),
        (lambda: memlaw.write([("a", "b")], "out", memlaw.WriteConfig(), rank=1), "not both"),
        (lambda: memlaw.write([("a", "b")], "out", objective="dpo"), "no objective 'dpo'"),
    ],
)
def test_settings_that_do_not_exist_are_refused_by_name(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(memlaw.MemlawError, match=message):
        call()
    assert list(tmp_path.iterdir()) == []
