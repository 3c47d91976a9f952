"""Check an adapter with nothing but Transformers and PEFT: load it, ask it, compare.

    python examples/recite_with_peft.py OUT records.jsonl [PROMPT_FIELD COMPLETION_FIELD]

Reads rows with a prompt and a completion, or with messages of which the last is the answer. How
prompts are rendered, and which token ends an answer, is the certificate's if OUT has one. Exit
status 0 when every record is recited word for word.
"""

import json
import sys
from datetime import datetime
from pathlib import Path

import torch
import transformers.utils.chat_template_utils as templates
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

folder, data = sys.argv[1:3]
prompt_field, completion_field = sys.argv[3:5] or ("prompt", "completion")
path = Path(folder, "certificate.json")
certificate = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

base = PeftConfig.from_pretrained(folder).base_model_name_or_path
own_words = Path(folder, "tokenizer_config.json").exists()
tokenizer = AutoTokenizer.from_pretrained(folder if own_words else base)
speaks = type(AutoConfig.from_pretrained(base)) in MODEL_FOR_CAUSAL_LM_MAPPING  # or it sees, too
model = (AutoModelForCausalLM if speaks else AutoModelForImageTextToText).from_pretrained(base)
end = certificate.get("end_token_id", tokenizer.eos_token_id)
model.generation_config = GenerationConfig(  # instead of the model's own penalties and stops
    do_sample=False, max_new_tokens=512, eos_token_id=end, pad_token_id=end
)
model = PeftModel.from_pretrained(model, folder).eval()

if certificate.get("clock"):  # the chat template tells the time: the certificate's

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(certificate["clock"])

    templates.datetime = Clock


def rendered(chat, row):
    """The text of a prompt, up to the answer."""
    given = certificate.get("template_args", {}) | (row.get("chat_template_kwargs") or {})
    given |= {"tools": row.get("tools"), "tokenize": False}
    if certificate.get("prompt_rendering") != "conversation":
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, **given)
    whole = [*chat, {"role": "assistant", "content": "ANSWER"}]
    return tokenizer.apply_chat_template(whole, **given).rpartition("ANSWER")[0]


with open(data, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file if line.strip()]

in_chat = certificate.get("prompt_format", "chat") == "chat" and tokenizer.chat_template
right = 0
for row in rows:
    if "messages" in row:
        chat, wanted = row["messages"][:-1], row["messages"][-1]["content"]
    else:
        chat = [{"role": "user", "content": row[prompt_field]}]
        wanted = row[completion_field]
    if in_chat:
        prompt = tokenizer(rendered(chat, row), add_special_tokens=False, return_tensors="pt")
    else:
        prompt = tokenizer("\n".join(m["content"] for m in chat), return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**prompt)
    said = tokenizer.decode(
        out[0, prompt["input_ids"].shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    right += said == wanted
    if said != wanted:
        print(f"{chat[-1]['content']!r}: {said!r} instead of {wanted!r}")

print(f"{right} of {len(rows)} recited word for word, computed in {model.dtype}")
sys.exit(right != len(rows))
