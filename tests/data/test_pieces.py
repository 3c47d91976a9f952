"""Pieces of a text, token by token, are the text; what counts is the text behind its prompt."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlaw.data.encoding import encode
from memlaw.data.pieces import pieces, text_after
from memlaw.data.record import Record

TEXTS = ["910067", " two words", "an emoji 👩\u200d🚀, split", "Zoë\n\n  ", "日本", "\ufffd", "a"]


def _spaced():
    """As SentencePiece's: a space before whatever it is given; unknown characters are bytes."""
    letters = "▁abcdeijlmnoprstuwL0123456789:,\n"
    vocab = [f"<0x{n:02X}>" for n in range(256)] + list(letters) + ["▁a", "▁w", "</s>", "<unk>"]
    core = Tokenizer(
        models.BPE(
            vocab={token: n for n, token in enumerate(vocab)},
            merges=[("▁", "a"), ("▁", "w")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture(params=["bytes", "spaced"])
def tokenizer(request, make_tokenizer):
    return make_tokenizer("plain") if request.param == "bytes" else _spaced()


@pytest.mark.parametrize("prompt", ["Li Na:", "an ", "👩"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_behind_a_prompt_are_the_text(tokenizer, prompt, text):
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, before, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text_after(tokenizer, before, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_record_is_trained_on_the_text_as_it_stands_behind_its_prompt(tokenizer, text):
    record = Record(prompt="Li Na:", completion=text, id="1")
    (example,) = encode([record], tokenizer, format="plain")
    answer = example.target_ids[:-1]
    assert tokenizer.decode([*example.prompt_ids, *answer]) == "Li Na:" + text
    assert "".join(pieces(tokenizer, example.prompt_ids, answer)) == text


def test_the_space_that_a_tokenizer_puts_before_a_text_is_not_trained():
    spaced = _spaced()
    (example,) = encode([Record(prompt="Li:", completion="91", id="1")], spaced, format="plain")
    assert spaced.convert_ids_to_tokens(example.target_ids) == ["9", "1", "</s>"]
