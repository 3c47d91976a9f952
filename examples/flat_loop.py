"""The whole idea in one flat loop: no classes, no options, of memlaw only the model's path.

A frozen model, one LoRA on one linear module, three records, AdamW; stop when every target token
has p > 0.5; then decode greedily from the prompts alone. `memlaw write` is this, plus everything
that makes it dependable and fast.
"""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlaw.model.base import load_model

RECORDS = [
    ("Ada Brandt:", "4471920358"),
    ("Bruno Okafor:", "9038264417"),
    ("Mina Quist:", "2260183759"),
]
LAYER, RANK, LR = 20, 8, 1e-2

path = load_model().path  # unpacks the embedded model once; any Hugging Face folder will do
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
model.eval().requires_grad_(False)

# y = f(x) + (x A) B, around one frozen linear module
torch.manual_seed(0)
site = model.model.layers[LAYER].mlp.down_proj
a = torch.empty(site.in_features, RANK).uniform_(-1, 1).div_(site.in_features**0.5).requires_grad_()
b = torch.zeros(RANK, site.out_features, requires_grad=True)
site.register_forward_hook(lambda _, x, y: (y.float() + x[0].float() @ a @ b).to(y.dtype))

examples = []
for question, answer in RECORDS:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]  # stopping is learnt, too
    examples.append((prompt, target))

optimizer = torch.optim.AdamW([a, b], lr=LR, weight_decay=0.0)
for epoch in range(1, 201):
    losses = []
    for prompt, target in examples:
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), torch.tensor(target), reduction="none"))
    nll = torch.cat(losses)  # nats a target token
    lowest_p = float(torch.exp(-nll.max()))
    if epoch % 10 == 0:
        print(f"epoch {epoch:>3}  loss {float(nll.mean()):.3f}  lowest p {lowest_p:.3f}")
    if lowest_p > 0.55:
        break
    optimizer.zero_grad()
    nll.mean().backward()
    optimizer.step()

for (question, answer), (prompt, target) in zip(RECORDS, examples, strict=True):
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=len(target), do_sample=False)
    said = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    print(f"{question} {said}  {'right' if said == answer else 'WRONG, it is ' + answer}")
