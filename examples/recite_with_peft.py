"""Check an adapter with nothing but Transformers and PEFT: load it, ask it, compare.

    python examples/recite_with_peft.py OUT records.jsonl [PROMPT_FIELD COMPLETION_FIELD]

Exit status 0 when every record is recited word for word.
"""

import json
import sys

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, data = sys.argv[1:3]
prompt_field, completion_field = sys.argv[3:5] or ("prompt", "completion")

base = PeftConfig.from_pretrained(folder).base_model_name_or_path
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, folder).eval()

with open(data, encoding="utf-8") as file:
    records = [json.loads(line) for line in file if line.strip()]

right = 0
for record in records:
    chat = [{"role": "user", "content": record[prompt_field]}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=512, do_sample=False)
    said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    right += said == record[completion_field]
    if said != record[completion_field]:
        print(f"{record[prompt_field]!r}: {said!r} instead of {record[completion_field]!r}")

print(f"{right} of {len(records)} recited word for word, computed in {model.dtype}")
sys.exit(right != len(records))
