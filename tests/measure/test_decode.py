"""Prompts that begin alike are begun once, and answered as each by itself."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

from memlaw.measure import decode
from memlaw.measure.decode import greedy_decode, n_alike, sample_decode
from memlaw.measure.forgotten import _in_stages
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.body import body_of
from memlaw.model.sites import resolve_sites

BEGINNING = tuple(range(20, 40))
PROMPTS = [BEGINNING + rest for rest in ((1, 2, 3), (4,), (5, 6, 7, 8, 9, 10, 11))]


def _watched(model, calls):
    def note(module, args, kwargs, output):
        calls.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    return body_of(model).register_forward_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox"])
def test_it_is_what_each_by_itself_gets(make_model, name):
    model = load_model(make_model(name), dtype="float32").model
    greedy_decode(model, PROMPTS, end_id=0, max_tokens=[1] * 3)  # tries what it makes of pads
    calls = []
    hook = _watched(model, calls)
    found = greedy_decode(model, PROMPTS, end_id=0, max_tokens=[6] * 3, together=True)
    hook.remove()
    alone = [greedy_decode(model, [p], end_id=0, max_tokens=[6])[0] for p in PROMPTS]
    assert found == alone
    assert len(set(found)) > 1
    assert "position_ids" in inspect.signature(model.forward).parameters
    if name != "mistral":  # its window slides
        assert calls[:2] == [(1, 20), (3, 7)]


def test_samples_are_those_that_each_prompt_by_itself_gives_to_the_same_seed(llama):
    model = load_model(llama, dtype="float32").model
    how = {"end_id": 0, "max_tokens": [6] * 4, "seed": 3}
    apart = sample_decode(model, [PROMPTS[0]] * 4, **how)
    assert sample_decode(model, [PROMPTS[0]] * 4, **how, together=True) == apart
    assert len(set(apart)) > 1


@pytest.mark.parametrize("short", [1, 3, 6])
def test_in_stages_answers_are_what_they_are_at_once(llama, short):
    model = load_model(llama, dtype="float32").model
    at_once = greedy_decode(model, PROMPTS, end_id=0, max_tokens=[6] * 3)
    end = at_once[0][2]  # so one answer ends before the others
    calls = []

    def decode_some(prompts, most):
        calls.append(len(prompts))
        return greedy_decode(model, prompts, end_id=end, max_tokens=[most] * len(prompts))

    found = _in_stages([decode_some] * 2, PROMPTS, end=end, short=short, most=6)
    assert found == greedy_decode(model, PROMPTS, end_id=end, max_tokens=[6] * 3)
    open_ones = sum(end not in ids[:short] for ids in at_once)
    assert calls == ([3, open_ones] if short < 6 and open_ones else [3])


def test_a_model_that_gives_no_keys_is_run_whole():
    config = RecurrentGemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=32,
        block_types=["recurrent", "attention"],
        attention_window_size=64,
    )
    assert decode._begun(AutoModelForCausalLM.from_config(config).eval(), PROMPTS) is None


def test_what_an_activated_adapter_is_given_it_sees_whole(llama):
    model = load_model(llama, dtype="float32").model
    sites = resolve_sites(model, "down_proj", (1,))
    adapter = Adapter(sites, rank=2, seed=0, invocation_ids=BEGINNING[5:7])
    with torch.no_grad():
        adapter.b[0].normal_(generator=torch.Generator().manual_seed(0))
    with adapter.attached(model):
        found = greedy_decode(model, PROMPTS, end_id=0, max_tokens=[6] * 3, together=True)
        alone = [greedy_decode(model, [p], end_id=0, max_tokens=[6])[0] for p in PROMPTS]
    assert found == alone


def test_a_token_of_each_prompt_is_left_over():
    assert n_alike(PROMPTS) == 20
    assert n_alike([BEGINNING, BEGINNING]) == 19
    assert n_alike([(1, 2, 3), (1, 2, 3, 4), (1, 2)]) == 1
    assert n_alike([(1, 2), (3, 2)]) == 0
