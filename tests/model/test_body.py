"""A model's key-value cache, by both names that Transformers has had for it."""

from types import SimpleNamespace

import pytest
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlaw.model.base import load_model
from memlaw.model.body import cache_in, cache_name


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_either_name(name):
    cache = DynamicCache()
    assert cache_in({name: cache, "use_cache": True}) is cache
    assert cache_in(SimpleNamespace(**{name: cache})) is cache
    passes = {
        "cache": lambda ids, cache=None: None,
        "past_key_values": lambda ids, past_key_values=None: None,
    }
    assert cache_name(SimpleNamespace(forward=passes[name])) == name


def test_where_there_is_none_nothing_is_found_and_nobody_warned(caplog):
    for held in ({"use_cache": False}, CausalLMOutputWithPast(), (1, 2), SimpleNamespace()):
        assert cache_in(held) is None
    assert not caplog.records


def test_a_models_own_output_goes_in_again(llama):
    model = load_model(llama).model
    ids = model.dummy_inputs["input_ids"]
    first = cache_in(model(ids, use_cache=True))
    assert first.get_seq_length() == ids.shape[1]
    second = cache_in(model(ids, use_cache=True, **{cache_name(model): first}))
    assert second is first
    assert second.get_seq_length() == 2 * ids.shape[1]
