"""Tokens that a model has no row for, or can't tell from another, are refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

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
