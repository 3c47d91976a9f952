"""Tokens that a model has no row for, or can't tell from another, are refused by name."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig

from memlaw.core.errors import ModelError
from memlaw.data.encoding import encode
from memlaw.data.reading import read_records
from memlaw.model.vocabulary import require_rows, require_sayable


@pytest.fixture
def loaded(make_model, chat_tokenizer):
    """`loaded("llama")`: a model that a test may change."""

    def load(name):
        found = AutoModelForCausalLM.from_pretrained(make_model(name), dtype=torch.float32)
        return found.requires_grad_(False).eval()

    return load


@pytest.fixture(scope="module")
def examples(chat_tokenizer, phone_book):
    return encode(read_records(phone_book), chat_tokenizer, format="chat")


def test_tokens_within_the_embedding_pass(loaded, chat_tokenizer, examples):
    require_rows(loaded("llama"), chat_tokenizer, (e.prompt_ids for e in examples))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_token_without_a_row_is_named_with_the_rows(loaded, chat_tokenizer, examples, name):
    model = loaded(name)
    size = model.config.vocab_size
    model.resize_token_embeddings(size - 2)
    with pytest.raises(ModelError, match=rf"has {size - 2} rows.*'<\|im_start\|>' \(id {size - 2}"):
        require_rows(model, chat_tokenizer, (e.prompt_ids for e in examples))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_rows_that_differ_pass(loaded, chat_tokenizer, examples, name):
    require_sayable(loaded(name), chat_tokenizer, examples, 0.55)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # a head of its own, and a tied one
def test_an_end_token_whose_row_equals_anothers_is_named(
    loaded, chat_tokenizer, examples, name, noise
):
    model = loaded(name)
    end, other = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    head = model.get_output_embeddings().weight
    head[end] = head[other] + noise * torch.randn(head.shape[1])
    with pytest.raises(ModelError, match=r"can't say '<\|im_end\|>' .* equals that of '<\|endoft"):
        require_sayable(model, chat_tokenizer, examples, 0.55)


def test_equal_rows_of_a_digit_are_found_too(loaded, chat_tokenizer, examples):
    model = loaded("llama")
    one, two = chat_tokenizer.convert_tokens_to_ids(["1", "Q"])
    head = model.get_output_embeddings().weight
    head[two] = head[one]
    with pytest.raises(ModelError, match=r"can't say '1' .* equals that of 'Q'"):
        require_sayable(model, chat_tokenizer, examples, 0.55)


def test_equal_rows_of_tokens_that_no_record_has_do_not_matter(loaded, chat_tokenizer, examples):
    model = loaded("llama")
    one, two = chat_tokenizer.convert_tokens_to_ids(["Q", "R"])
    head = model.get_output_embeddings().weight
    head[two] = head[one]
    require_sayable(model, chat_tokenizer, examples, 0.55)


def test_a_bias_of_the_head_tells_equal_rows_apart(loaded, chat_tokenizer, examples):
    model = loaded("llama")
    end, other = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    head = model.get_output_embeddings()
    head.weight[end] = head.weight[other]
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=False)
    head.bias[end] = 3.0
    require_sayable(model, chat_tokenizer, examples, 0.55)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_a_head_whose_rows_are_too_short_is_refused(loaded, chat_tokenizer, examples, name):
    model = loaded(name)
    head = model.get_output_embeddings()
    head.weight.mul_(0.25 * 64**-0.5 / head.weight.std())  # of norm ¼, where states are 8 long
    with pytest.raises(ModelError, match=r"can't say .* so short .*: name a trained model"):
        require_sayable(model, chat_tokenizer, examples, 0.55)
    head.weight.mul_(16)
    require_sayable(model, chat_tokenizer, examples, 0.55)


def test_what_the_final_norm_multiplies_by_counts(loaded, chat_tokenizer, examples):
    model = loaded("llama")
    model.lm_head.weight.mul_(1 / 16)
    with pytest.raises(ModelError, match="so short"):
        require_sayable(model, chat_tokenizer, examples, 0.55)
    model.model.norm.weight[3] = 16.0  # along one axis: an adapter may learn to use that alone
    require_sayable(model, chat_tokenizer, examples, 0.55)


def test_the_bound_is_above_whatever_a_hidden_state_gives(loaded, chat_tokenizer, examples):
    model = loaded("gemma")  # its norm multiplies by 1 + weight
    model.model.norm.weight.copy_(torch.linspace(-0.5, 2, 64))
    model.lm_head.weight.mul_(0.2)
    token = examples[0].target_ids[-1]
    hidden = torch.randn(64, requires_grad=True)
    for _ in range(200):
        logits = model.lm_head(model.model.norm(hidden[None, None]))[0, 0]
        loss = -logits.log_softmax(0)[token]
        (gradient,) = torch.autograd.grad(loss, hidden)
        hidden = (hidden - 10 * gradient).detach().requires_grad_()
    reached = math.exp(-loss.item())
    assert 0.2 < reached < 0.9
    only = [dataclasses.replace(examples[0], target_ids=(token,))]
    require_sayable(model, chat_tokenizer, only, reached)


@pytest.mark.parametrize(("scale", "is_refused"), [(0.5, True), (8.0, False)])
def test_what_the_model_multiplies_logits_by_counts(chat_tokenizer, examples, scale, is_refused):
    config = CohereConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.06,
        vocab_size=len(chat_tokenizer),
        logit_scale=scale,
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    with pytest.raises(ModelError, match="so short") if is_refused else nullcontext():
        require_sayable(model, chat_tokenizer, examples, 0.55)
