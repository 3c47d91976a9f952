"""What an update takes from the run that it continues, and what it is given instead."""

import pytest

from memlaw.core.errors import ConfigError
from memlaw.settings.update import UpdateConfig

RUN = {"config": {"keep": "old/keep.txt", "near": "old/near.txt", "rank": 8, "layers": [1, 2]}}


def test_files_that_were_moved_are_found_where_they_now_lie():
    then = UpdateConfig().over(RUN)
    assert (then.keep, then.near, then.paraphrases) == ("old/keep.txt", "old/near.txt", None)
    now = UpdateConfig(keep="keep.txt", near="near.txt", paraphrases="said.jsonl").over(RUN)
    assert (now.keep, now.near, now.paraphrases) == ("keep.txt", "near.txt", "said.jsonl")
    assert (now.rank, now.layers) == (then.rank, then.layers) == (8, (1, 2))


@pytest.mark.parametrize("config", [["near"], {"rank": []}])
def test_a_run_whose_settings_cant_be_read_is_refused(config):
    with pytest.raises(ConfigError, match=r"run\.json"):
        UpdateConfig().over({"config": config})
