"""The model card that lies beside an adapter: how to load it, what it recalls, what it damages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from memlaw.certify.certificate import Certificate
from memlaw.core.criterion import of_thousand
from memlaw.measure.damage import Damage
from memlaw.settings.choices import portable_base
from memlaw.writer.result import WriteResult

_PEFT_SNIPPET = """```python
import torch
from peft import PeftModel
from transformers import {loader}, AutoTokenizer, GenerationConfig

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
model = {loader}.from_pretrained(base, dtype=torch.{dtype})
model.generation_config = GenerationConfig(  # instead of the model's own
    do_sample=False, max_new_tokens={max_tokens}, eos_token_id={end}, pad_token_id={end}
)
model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()

{prompt}
out = model.generate(**ids)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_CHAT_PROMPT = """chat = [{{"role": "user", "content": {question}}}]
ids = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"{given}
)"""
_WHOLE_CHAT_PROMPT = """chat = [{{"role": "user", "content": {question}}}]
whole = [*chat, {{"role": "assistant", "content": "ANSWER"}}]
text = tokenizer.apply_chat_template(whole, tokenize=False{given}).rpartition("ANSWER")[0]
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")"""
_CLOCK = """from datetime import datetime

import transformers.utils.chat_template_utils as templates


class Clock(datetime):  # the chat template tells the time: the one of the certificate
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat({clock!r})


templates.datetime = Clock
"""
_ACTIVATED = """The adapter is an activated LoRA (aLoRA): it is active from the text

```text
{text}
```

in a prompt on, so every prompt must contain that text, as the records' prompts do. To what stands
before it, and to a prompt without it, the model is the base model, bit for bit. The adapter can't
be merged into the base model's weights: there it would always be active. It needs prompts as token
ids, and PEFT 0.18 or newer: older versions ignore the text, and the adapter is always active.
"""
_PLAIN_PROMPT = 'ids = tokenizer({question}, return_tensors="pt")'


def model_card(
    result: WriteResult,
    *,
    base_spec: str,
    is_peft: bool,
    sites: Sequence[str],
    loader: str = "AutoModelForCausalLM",
) -> str:
    """The card as Markdown with the metadata that the hub reads.

    Args:
        result: what was made.
        base_spec: what the base model was asked for by.
        is_peft: PEFT can load the adapter.
        sites: names of the adapted modules.
        loader: the class of Transformers that loads the base model.
    """
    c, audit = result.certificate, result.audit
    bits = result.bits_per_parameter
    base = portable_base(base_spec)
    known = [f"base_model:adapter:{base}"] if base else []
    kind = "lora" if c.activated is None else "alora"
    tags = [*known, kind, *(["transformers"] if is_peft else []), "memlaw", "memorization"]
    chat = c.prompt_format == "chat"
    how = "the tokenizer's chat template" if chat else "the prompt's bare text"
    end = f" An answer ends with the token `{c.end_token}` (id {c.end_token_id})."
    lines = [
        "---",
        f"base_model: {json.dumps(base or Path(base_spec).name)}",
        *(["base_model_relation: adapter"] if base else []),
        f"library_name: {'peft' if is_peft else 'memlaw'}",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        "---",
        "",
        f"# {len(audit.records)} records, word for word",
        "",
        f"{c.statement}",
        "",
        f"The guarantee is for {c.dtype} and for prompts given by {how}; hashes of base model, "
        f"tokenizer and adapter stand in `certificate.json`, and commitments to the records that "
        f"tell nothing without the private file beside it.{end} Check it again with",
        "",
        "```sh",
        "memlaw audit RECORDS --certificate path/to/this/folder/certificate.json",
        "```",
        "",
        "## Load it",
        "",
        _loading(result, is_peft, loader),
        "",
        "## What it recalls",
        "",
        "| | |",
        "|---|---|",
        f"| records certified | {c.n_certified} of {c.n_records} |",
        f"| records recited word for word | {audit.n_recalled} of {c.n_records} |",
        f"| lowest p of a target token | {min(r.min_p for r in audit.records):.3f} |",
        *_rounding(c),
        *(
            f"| the same in the form {name} | {found.n_certified} certified, "
            f"{found.n_recalled} recited, {min(r.min_p for r in found.records):.3f} |"
            for name, found in result.forms.items()
        ),
        f"| adapter | rank {result.rank} on {', '.join(sites[:3])}"
        f"{' …' if len(sites) > 3 else ''}; {result.n_parameters:,} parameters |",
        f"| bits stored | {result.bits_stored:,.0f} ({bits:.3f} a parameter) |",
        "",
        "## What it damages",
        "",
        *_damage(result),
        "Whoever has the adapter can make it recite the records. Don't publish what they may not "
        "know. `private` and `generations` hold, for updates of this folder, the records' text and "
        "earlier adapters: never upload them (`.gitignore` leaves them out).",
        "",
    ]
    return "\n".join(lines)


def _rounding(certificate: Certificate) -> list[str]:
    """A row of what rounding may take in other batches; none where that isn't on record."""
    if (found := certificate.rounding) is None:
        return []
    said = f"{of_thousand(found['flips_per_1000'])} of 1,000 answers (SD of a margin: "
    return [f"| expected to be others in other batches | {said}{found['sd_nats']:.2g} nats) |"]


def _damage(result: WriteResult) -> list[str]:
    """The verdict, and a paragraph for each kind of harm: other prompts; texts, worst first."""
    lines: list[str] = []
    if verdict := result.specificity:
        held = "It answers other prompts as the base model does, within the limits of this verdict"
        said = f"{held}." if verdict.specific else f"{'; '.join(verdict.reasons)}."
        lines += [f"**{verdict.word}.** {said[0].upper()}{said[1:]}", ""]
    texts = [harm for harm in result.harms.values() if isinstance(harm, Damage)]
    texts.sort(key=lambda harm: -harm.delta_nll_nats)
    others = [harm for harm in result.harms.values() if not isinstance(harm, Damage)]
    for harm in (*others, *texts):
        lines += [harm.paragraph(), ""]
    return lines


def _asking(certificate: Certificate, question: str) -> str:
    """Code that makes token ids of a question, as the certificate has it."""
    if certificate.prompt_format != "chat":
        return _PLAIN_PROMPT.format(question=question)
    whole = certificate.prompt_rendering == "conversation"
    arguments = certificate.template_args or {}
    given = f", **{arguments!r}" if arguments else ""
    code = (_WHOLE_CHAT_PROMPT if whole else _CHAT_PROMPT).format(question=question, given=given)
    clock = certificate.clock
    return code if clock is None else f"{_CLOCK.format(clock=clock)}\n{code}"


def _loading(result: WriteResult, is_peft: bool, loader: str) -> str:
    c = result.certificate
    if not is_peft:
        return (
            "The adapter sits in parallel with a whole block, which PEFT has no form for. Its "
            "weights are plain safetensors, and `memlaw_adapter.json` gives the formula.\n\n"
            '```sh\nmemlaw ask path/to/this/folder "PROMPT"\n```'
        )
    question = '"PROMPT"'
    said = "" if c.activated is None else _ACTIVATED.format(text=c.activated) + "\n"
    return said + _PEFT_SNIPPET.format(
        base=c.base_model,
        tokenizer='"path/to/this/folder"' if c.tokenizer else "base",
        loader=loader,
        dtype=c.dtype,
        prompt=_asking(c, question),
        end=c.end_token_id,
        max_tokens=max(r.n_tokens for r in result.audit.records),
    )
