"""What a model's own generation settings would make of an answer that is decoded greedily."""

from __future__ import annotations

from typing import Any

# Settings of `generation_config.json` that change what is said, and their values that don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
    "max_time": (None,),
}


def generation_notice(model: Any, tokenizer: Any, end_id: int) -> str:
    """A sentence on what `generate` would do otherwise than greedy decoding up to the end token.

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        end_id: the token that ends an answer.

    Returns:
        Empty where `generate` says the same and stops there.
    """
    config = model.generation_config
    found = [
        f"{name} {value!r:.40}"
        for name, neutral in _NEUTRAL.items()
        if (value := getattr(config, name, None)) not in neutral
    ]
    stops = config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    shown = ", ".join(repr(tokenizer.decode([token])) for token in stops)
    if end_id not in stops:
        found.append(
            f"a stop at {shown or 'no token'}, not at {tokenizer.decode([end_id])!r}, which ends "
            "an answer here"
        )
    if not found:
        return ""
    return (
        f"The model's own generation settings ask for {'; '.join(found)}. With them generate(), "
        "and servers that read them, may say something else than what is certified. The model "
        "card's snippet sets them aside."
    )
