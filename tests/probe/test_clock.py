"""A chat template that tells the time is told the same in all cells, whenever they are run."""

import datetime

import pytest
import transformers.utils.chat_template_utils as templates

from memlaw.model.base import load_model
from memlaw.probe.grid import CLOCK, Grid
from memlaw.settings.probe import ProbeConfig

DATED = "{{ strftime_now('%d %b %Y') }}\n"


@pytest.fixture
def grid(llama):
    """`grid(dated)`: a probe's grid."""

    def make(dated):
        base = load_model(str(llama))
        if dated:
            base.tokenizer.chat_template = DATED + base.tokenizer.chat_template
        config = ProbeConfig(task="phonebook", ranks=(1,), lengths=(20,))
        return Grid(config, base=base)

    return make


def test_the_same_cells_are_asked_for_on_another_day(grid, monkeypatch):
    keys, prompts = set(), set()
    for year in (2001, 2033):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 2, 3)

        monkeypatch.setattr(templates, "datetime", Clock)
        probe = grid(dated=True)
        (spec,) = probe.specs()
        keys.add(probe.key(spec))
        example = probe.examples(spec.length, spec.seed)[0]
        prompts.add(probe.base.tokenizer.decode(example.prompt_ids))
        assert probe.identity(spec)["clock"] == CLOCK
    assert len(keys) == len(prompts) == 1
    assert "01 Jan 2026" in prompts.pop()


def test_other_templates_have_no_clock_on_record(grid):
    probe = grid(dated=False)
    assert "clock" not in probe.identity(probe.specs()[0])
