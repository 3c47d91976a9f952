"""Bigger corpora of the base: python corp2.py own|rest"""
import sys, json, time, torch
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
import evaluate as E
from memlaw.models import load_model
from memlaw.records import encode, encode_prompt
from memlaw.damage import windows, retained_text
base = load_model(); tok, model = base.tokenizer, base.model
end = encode(E.book(1), tok, format="chat")[0].target_ids[-1]
ban = E.forbidden(base)
from memlaw.forward import logits_of
@torch.inference_mode()
def sample(ids, k, bs=100):
    """ids: one prompt, bs copies; the shared beginning run once."""
    c = model.base_model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values; c.batch_repeat_interleave(bs)
    x = torch.full((bs, 1), ids[-1]); out = []
    for _ in range(k):
        h = model.base_model(x, past_key_values=c, use_cache=True).last_hidden_state[:, -1].contiguous()
        p = logits_of(model, h).float().softmax(1); p[p < 0.02 * p.amax(1, keepdim=True)] = 0
        x = torch.multinomial(p, 1); out.append(x)
    return torch.cat(out, 1)
def own_prompts(n, seed):
    torch.manual_seed(seed); head = tok.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False).split("@@")[0]; out = {}
    while len(out) < n:
        t1 = time.time()
        for x in sample(tok(head, add_special_tokens=False)["input_ids"], 24).tolist():
            p = tok.decode(x[:x.index(end)] if end in x else x, skip_special_tokens=True).strip()
            if p and p not in ban: out[p] = 1
        print(len(out), round(time.time() - t1, 1), flush=True)
    return list(out)[:n]
which = sys.argv[1]; t = time.time()
if which == "own":
    ps = own_prompts(500, 77); print(len(ps), time.time() - t, flush=True)
    conv = [[{"role": "user", "content": p}] for p in ps]
else:
    conv = [c for c in json.load(open("train_prompts.json")) if c[-1]["content"] not in ban]
ids = [list(encode_prompt(tok, c, "chat")) for c in conv]
keep = [i for i, x in enumerate(ids) if len(x) < 220]; ids = [ids[i] for i in keep]; conv = [conv[i] for i in keep]
torch.manual_seed(5)
greedy, sampled = [None] * len(ids), [None] * len(ids)
greedy[1::2] = E.decode_all(model, ids[1::2], end, 32, 100); print("greedy", time.time() - t, flush=True)
sampled[::2] = E.sample_all(model, ids[::2], end, 32, 100); print("sampled", time.time() - t, flush=True)
out = dict(ids=ids, greedy=greedy, sampled=sampled, conv=conv)
if which == "own":
    start = torch.full((64, 1), tok.convert_tokens_to_ids("<|endoftext|>"))
    out["text"] = torch.cat([model.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, min_new_tokens=95, max_new_tokens=95, eos_token_id=end, pad_token_id=end) for _ in range(2)])
    out["docs"] = windows(tok, retained_text(), context=base.context_length, n_windows=96)
    print(out["text"].shape, out["docs"].shape, time.time() - t)
torch.save(out, f"evaldata/corp2_{which}.pt")
