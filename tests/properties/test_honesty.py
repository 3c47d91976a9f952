"""Four classic faults of published training code, each shown to be absent here.

Adapter and optimiser in bfloat16; padding masked by token value, so that real end-of-turn tokens
vanish; one tokenisation in training and another in generation; a last short batch that is lost.
"""

import functools
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw.data.encoding import encode, end_of_turn_id
from memlaw.data.reading import read_records
from memlaw.model.forward import collate, target_logits

_write = functools.partial(memlaw.write, specificity=False)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def examples(chat_tokenizer):
    """Two chats of different lengths, with end-of-turn tokens inside their prompts."""
    turns = [
        {"role": "user", "content": "Who is on the line?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Her number?"},
        {"role": "assistant", "content": "447020"},
    ]
    records = read_records(
        [{"messages": turns}, {"messages": [*turns[:1], {"role": "assistant", "content": "Li"}]}]
    )
    return encode(records, chat_tokenizer, format="chat")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapter_and_adam_moments_are_float32_whatever_the_base_is(
    llama, phone_book, tmp_path, dtype
):
    result = _write(phone_book, tmp_path / "out", model=str(llama), dtype=dtype, max_epochs=2)
    assert not result.certified
    assert result.certificate.dtype == dtype
    kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
    adapter = {name for name in kept if name.startswith("adapter.")}
    moments = {name for name in kept if name.startswith("moments.")}
    assert adapter
    assert sum("exp_avg" in name for name in moments) == 3 * len(adapter)  # two, and the highest
    assert {kept[name].dtype for name in adapter | moments} == {torch.float32}
    assert {t.dtype for t in load_file(result.out / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_small_steps_are_not_rounded_away_under_a_bfloat16_base(llama, phone_book, tmp_path):
    # In bfloat16 a step of 1e-5 from a weight of 0.1 would change nothing.
    def weights(epochs):
        _write(
            phone_book,
            tmp_path / str(epochs),
            model=str(llama),
            dtype="bfloat16",
            learning_rate=1e-5,
            rank=4,
            max_epochs=epochs,
        )
        tensors = load_file(tmp_path / str(epochs) / "adapter_model.safetensors")
        return next(t for name, t in tensors.items() if "lora_A" in name)

    early, late = weights(3), weights(6)
    large = early.abs() > 0.05
    moved = (early != late)[large]
    assert large.any()
    assert moved.float().mean() > 0.95


def test_real_end_of_turn_tokens_are_seen_where_pad_has_the_same_id(chat_tokenizer, examples):
    end = end_of_turn_id(chat_tokenizer, "chat")
    assert end == chat_tokenizer.pad_token_id
    batch = collate(examples)
    for row, example in enumerate(examples):
        ids = example.prompt_ids + example.target_ids
        assert ids.count(end) >= 2
        assert batch.input_ids[row, : len(ids)].tolist() == list(ids)
        assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * (
            batch.input_ids.shape[1] - len(ids)
        )


def test_padding_changes_no_logit(llama, examples):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        together = target_logits(model, collate(examples))
        alone = torch.cat([target_logits(model, collate([e])) for e in examples])
        # and what is kept of one is what the plain model says there
        ids = torch.tensor([examples[0].prompt_ids + examples[0].target_ids])
        n = len(examples[0].target_ids)
        plain = model(ids).logits[0, -n - 1 : -1]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone[:n], plain, rtol=0, atol=1e-4)


def test_what_is_trained_on_is_what_the_plain_template_asks(llama, chat_tokenizer, examples):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for example in examples:
        asked = tokenizer.apply_chat_template(
            [dict(m) for m in example.record.prompt], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert list(example.prompt_ids) == asked
        whole = tokenizer.apply_chat_template(
            [*example.record.prompt, {"role": "assistant", "content": example.record.completion}],
            tokenize=False,
        )
        given = tokenizer.decode(example.prompt_ids + example.target_ids)
        assert whole == given + "\n"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_training_and_recitation_see_the_same_tokens(make_model, phone_book, tmp_path, kind):
    model = make_model("llama", tokenizer=kind)
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = encode(read_records(phone_book), tokenizer, format=kind)
    result = _write(phone_book, tmp_path / "out", model=str(model), max_epochs=300, retention=0)
    assert result.certified
    assert [e.prompt_ids for e in result.audit.examples] == [e.prompt_ids for e in examples]
    assert [r.decoded_ids for r in result.audit.records] == [e.target_ids for e in examples]
    for example in examples:
        answer = memlaw.ask(tmp_path / "out", example.record.prompt)
        assert (answer.text, answer.finished) == (example.record.completion, True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_no_record_is_lost_in_a_last_short_batch(llama, tmp_path, batch_size):
    names = ("Ann", "Bo", "Cy", "Di", "Ed", "Fay", "Gus")
    book = [(f"{name}:", f"{(17 * i * i + 3) % 1000:03}") for i, name in enumerate(names)]
    result = _write(
        book, tmp_path / "out", model=str(llama), batch_size=batch_size, max_epochs=300, retention=0
    )
    assert result.certificate.n_certified == len(book)
    assert result.audit.n_recalled == len(book)


@pytest.mark.parametrize("batch_size", [3, 4])
def test_an_epoch_takes_every_record_once_and_one_step_a_batch(llama, tmp_path, batch_size):
    seen = []
    observer = memlaw.Observer()
    observer.epoch = lambda stats, n_records, max_epochs: seen.append((stats.n_steps, n_records))
    book = [(f"Number {i}:", str(i)) for i in range(7)]
    _write(
        book,
        tmp_path / "out",
        model=str(llama),
        batch_size=batch_size,
        objective="sft",  # triage would leave some out
        max_epochs=3,
        observer=observer,
    )
    steps = math.ceil(7 / batch_size)
    assert seen == [(steps * epoch, 7) for epoch in (1, 2, 3)]
