"""docs/models.md says of each kind of adapter what the program does."""

import re
from pathlib import Path

import peft
import pytest
from packaging import version
from test_peft_folder import KINDS

from memlaw.model.peft_folder import REFUSED

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
ADAPTERS = PAGE.partition("## Adapters")[2]
ROWS = dict(re.findall(r"^\| ([A-Z0-9_]+) \| (\w+) \|", ADAPTERS, re.MULTILINE))


def test_the_refused_kinds_are_those_of_the_page():
    assert {kind for kind, done in ROWS.items() if done == "refused"} == set(REFUSED)


def test_the_measured_kinds_are_those_that_are_tested():
    tested = {config.peft_type.value for config in KINDS.values()}
    assert {kind for kind, done in ROWS.items() if done == "yes"} == tested


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.21"), reason="later kinds are listed, too"
)
@pytest.mark.parametrize("kind", sorted(ROWS))
def test_each_kind_is_one_of_pefts(kind):
    assert kind in peft.PeftType.__members__


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z-]+)", PAGE))))
def test_each_option_exists(option):
    from memlaw.settings.audit import AuditConfig
    from memlaw.settings.write import WriteConfig

    names = set(AuditConfig.__dataclass_fields__) | set(WriteConfig.__dataclass_fields__)
    assert option.removeprefix("--").replace("-", "_") in names
