"""Files that are nearly right: every reader reads them, or raises what it documents."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing import fuzzed
from readers import READING

N_CASES = 25  # of each; `make fuzz` has thousands


@pytest.mark.filterwarnings("error::ResourceWarning")  # a file left open
@pytest.mark.parametrize("name", READING)
def test_a_reader_raises_nothing_but_what_it_documents(name, tmp_path):
    seen, wrong = fuzzed(name, N_CASES, tmp_path)
    assert not wrong
    assert seen.total() >= N_CASES
