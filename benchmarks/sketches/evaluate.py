"""The whole table of ISSUE13 for one adapter. `python eval.py FOLDER [--fast]`, or `evaluate(base, adapter, ex)` in process.

What the base says is computed once and kept in evaldata/. None of these prompts may be used in training:
`forbidden()` gives them all.
"""
import json, random, re, sys, time, pathlib, torch
sys.path.insert(0, str(pathlib.Path(__file__).parent))
from everyday import EVERYDAY
from memlaw.records import encode_prompt, read_records, encode, Example, Record
from memlaw.recall import greedy_decode, audit_examples
from memlaw.damage import windows, unseen_text
from memlaw.forward import logits_of
from memlaw.adapters import Adapter, loaded_adapter
HERE = pathlib.Path(__file__).parent / "evaldata"
DATA = str(pathlib.Path(__file__).parent / "evaldata" / "phonebook.jsonl")
N_TOK, N_FAST = 32, 60

def book(n=100):
    return read_records(DATA, prompt_field="query", completion_field="target")[:n]

def make_near(recs, n, seed, taken=()):
    """Recombined: first word of one, last word of another; no record."""
    rng = random.Random(seed); names = [r.prompt.rstrip(":").split() for r in recs]
    have = {r.prompt for r in recs} | set(taken); out = []; tries = 0
    while len(out) < n and tries < 100 * n:
        tries += 1
        a, b = rng.sample(names, 2); p = f"{a[0]} {b[-1]}:"
        if p not in have: out.append(p); have.add(p)
    return out

def make_foreign(recs, n, seed, locales=("en_US",), taken=(), strict=True):
    """faker's names that share no word with the records."""
    from faker import Faker
    fk = Faker(list(locales)); fk.seed_instance(seed); words = {w for r in recs for w in r.prompt.rstrip(":").split()}
    have = set(taken); out = []
    while len(out) < n:
        a, b = fk.first_name(), fk.last_name(); p = f"{a} {b}:"
        if p in have or (strict and words & set(p.rstrip(":").split())): continue
        out.append(p); have.add(p)
    return out

LOC = ("de_DE", "fr_FR", "es_ES", "it_IT", "pl_PL", "nl_NL", "pt_BR", "sv_SE", "tr_TR", "en_IN")
def eval_near(recs):
    n = make_near(recs, 500, 990001)
    f = make_foreign(recs, 250, 990002); f += make_foreign(recs, 250, 990003, LOC, f)
    return n, f

_own = None
def own_prompts(base, n, seed, end):
    """User turns the base writes itself."""
    tok, model = base.tokenizer, base.model
    torch.manual_seed(seed)
    head = tok.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False).split("@@")[0]
    out = []
    while len(out) < n:
        ids = torch.tensor([tok(head, add_special_tokens=False)["input_ids"]] * 100)
        g = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=24, eos_token_id=end, pad_token_id=end)
        out += [p for p in (tok.decode(x[ids.shape[1]:], skip_special_tokens=True).strip() for x in g) if p and p not in out]
    return out[:n]

def assets(base, n_records=100):
    f = HERE / f"assets{n_records}.pt"
    if f.exists():
        A = torch.load(f, weights_only=False)
        for k in ("own", "own_ids", "own_ans", "own_sampled", "own_ans_h", "own_sampled_h"): A[k] = A[k][:72]
        for k in ("docs", "prose"): A[k], A[k + "_nll"] = A[k][:24], A[k + "_nll"][:24]
        return A
    HERE.mkdir(exist_ok=True)
    tok, model = base.tokenizer, base.model
    recs = book(n_records) if n_records <= 100 else many(n_records)
    end = encode(recs[:1], tok, format="chat")[0].target_ids[-1]
    A = {"end": end}
    A["everyday_ids"] = [list(encode_prompt(tok, m, "chat")) for m in EVERYDAY]
    A["own"] = own_prompts(base, 80, 990010, end)
    A["own_ids"] = [list(encode_prompt(tok, p, "chat")) for p in A["own"]]
    for k in ("everyday", "own"):
        A[k + "_ans"] = decode_all(model, A[k + "_ids"], end, N_TOK, 50)
    torch.manual_seed(990011)  # sampled answers, for the chats' dNLL
    A["own_sampled"] = sample_all(model, A["own_ids"], end, N_TOK, 50)
    n, fo = eval_near(recs)
    A["near"], A["foreign"] = n, fo
    A["near_ids"] = [list(encode_prompt(tok, p, "chat")) for p in n + fo]
    A["near_ans"] = near_decode(model, A["near_ids"], end, tok)
    text, _ = unseen_text()
    ctx = base.context_length
    alice = (HERE / "alice29.txt").read_text(errors="replace")[3000:]
    A["docs"] = windows(tok, text, context=ctx, n_windows=24); A["prose"] = windows(tok, alice, context=ctx, n_windows=24)
    for k in ("docs", "prose"): A[k + "_nll"] = text_nll(model, A[k])
    for k, ans in (("everyday", "everyday_ans"), ("own", "own_ans"), ("own", "own_sampled")):
        A[f"{ans}_h"] = hidden_at(model, A[k + "_ids"], A[ans])
    torch.save(A, f); return A

def many(n):
    """n phone numbers of the same kind (for 400 records): the published ones, then faker's."""
    recs = list(book(100)); rng = random.Random(5); have = {r.prompt for r in recs}
    for p in make_foreign([], 3 * n, 990099, strict=False):
        if p not in have and len(recs) < n:
            recs.append(Record(prompt=p, completion="".join(rng.choice("0123456789") for _ in range(10)), id=f"m{len(recs)}")); have.add(p)
    return recs

def forbidden(base, n_records=100):
    A = assets(base, n_records); return set(A["near"]) | set(A["foreign"]) | set(A["own"]) | {m["content"] for c in EVERYDAY for m in c}

def decode_all(model, ids, end, k, bs):
    order = sorted(range(len(ids)), key=lambda i: len(ids[i])); out = [None] * len(ids)
    for s in range(0, len(ids), bs):
        jj = order[s:s + bs]
        for j, a in zip(jj, greedy_decode(model, [ids[j] for j in jj], end_id=end, max_tokens=[k] * len(jj))): out[j] = list(a)
    return out

@torch.inference_mode()
def sample_all(model, ids, end, k, bs):
    """Answers drawn from the model itself, prompts padded on the left."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i])); out = [None] * len(ids)
    for s in range(0, len(ids), bs):
        jj = order[s:s + bs]; w = max(len(ids[j]) for j in jj); x = torch.full((len(jj), w), end); m = torch.zeros_like(x)
        for r, j in enumerate(jj): x[r, w - len(ids[j]):] = torch.tensor(ids[j]); m[r, w - len(ids[j]):] = 1
        g = model.generate(input_ids=x, attention_mask=m, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=k, eos_token_id=end, pad_token_id=end)[:, w:].tolist()
        for j, a in zip(jj, g): out[j] = a[: a.index(end) + 1] if end in a else a
    return out

@torch.inference_mode()
def near_decode(model, ids, end, tok, k=12, first=4, bs=250):
    """4 greedy tokens, the shared beginning run once; 12 where a digit is among them."""
    p = 0
    while all(q[p] == ids[0][p] and p < len(q) - 1 for q in ids): p += 1
    body, by, out = model.base_model, {}, [None] * len(ids)
    for i, q in enumerate(ids): by.setdefault(len(q), []).append(i)
    for ii in by.values():
        for s in range(0, len(ii), bs):
            jj = ii[s:s + bs]
            c = body(torch.tensor([ids[0][:p]]), use_cache=True).past_key_values
            c.batch_repeat_interleave(len(jj))
            x = torch.tensor([ids[j][p:] for j in jj]); got = torch.empty(len(jj), 0, dtype=torch.long)
            for n in range(k):
                h = body(x, past_key_values=c, use_cache=True).last_hidden_state[:, -1].contiguous()
                x = logits_of(model, h).argmax(-1)[:, None]; got = torch.cat([got, x], 1)
                if n + 1 == first:
                    go = [r for r, a in enumerate(got.tolist()) if any(ch.isdigit() for ch in tok.decode(a))]
                    for j, a in zip(jj, got.tolist()): out[j] = a
                    if not go: break
                    c.batch_select_indices(torch.tensor(go)); x, got, jj = x[go], got[go], [jj[r] for r in go]
            for j, a in zip(jj, got.tolist()): out[j] = a if n + 1 > first or out[j] is None else out[j]
    return [a[: a.index(end) + 1] if end in a else a for a in out]

@torch.inference_mode()
def hidden_at(model, prompts, answers, bs=16):
    """Final hidden states that predict each answer token: a list of [len, D]."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i])); out = [None] * len(prompts)
    for s in range(0, len(order), bs):
        jj = order[s:s + bs]; w = max(len(prompts[j]) + len(answers[j]) for j in jj)
        x = torch.zeros(len(jj), w, dtype=torch.long)
        for r, j in enumerate(jj): q = prompts[j] + answers[j]; x[r, :len(q)] = torch.tensor(q)
        h = model.base_model(x, use_cache=False).last_hidden_state
        for r, j in enumerate(jj): out[j] = h[r, len(prompts[j]) - 1: len(prompts[j]) + len(answers[j]) - 1].clone()
    return out

@torch.inference_mode()
def text_nll(model, w, bs=8):
    out = []
    for ids in w.split(bs):
        h = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1); t = ids[:, 1:].flatten()
        out.append(torch.cat([logits_of(model, a).float().log_softmax(1).gather(1, b[:, None])[:, 0] for a, b in zip(h.split(128), t.split(128))]).neg().view(len(ids), -1).mean(1))
    return torch.cat(out)

@torch.inference_mode()
def compare(model, h0, h1, answers):
    """mean KL(base||adapted) a token; NLL change a token on the answers; share of answers whose every token is the argmax."""
    a, b, t = torch.cat(h0), torch.cat(h1), torch.tensor([x for y in answers for x in y]); kl, d, ok = [], [], []
    for i in range(0, len(a), 64):
        lp, lq = (logits_of(model, x[i:i + 64]).float().log_softmax(1) for x in (a, b)); tt = t[i:i + 64, None]
        kl.append((lp.exp() * (lp - lq)).sum(1)); d.append((lp.gather(1, tt) - lq.gather(1, tt))[:, 0]); ok.append(lq.argmax(1) == tt[:, 0])
    kl, d, ok = torch.cat(kl), torch.cat(d), torch.cat(ok)
    n = [len(y) for y in answers]
    return kl.mean().item(), max(x.mean().item() for x in kl.split(n)), d.mean().item(), sum(bool(x.all()) for x in ok.split(n)) / len(n)

FORM = re.compile(r"\d{7,}")
def evaluate(base, attach, ex, *, fast=False, n_records=100, show=True):
    """attach: a callable that gives a context in which base.model is adapted."""
    A, model, tok = assets(base, n_records), base.model, base.tokenizer; end = A["end"]; t0 = time.time(); R = {}
    S = slice(0, None, 3) if fast else slice(None)
    stored = {tok.decode(e.target_ids[:-1]) for e in ex} if ex else set()
    with attach():
        ids, ans = A["everyday_ids"][S], A["everyday_ans"][S]
        he = hidden_at(model, ids, ans); ho = hidden_at(model, A["own_ids"][S], A["own_ans"][S]); hs = hidden_at(model, A["own_ids"][S], A["own_sampled"][S])
        got = decode_all(model, ids, end, N_TOK, 50)
        N = slice(0, None, 4) if fast else slice(None); k = len(A["near"][N]); nid, nans = A["near_ids"][:500][N] + A["near_ids"][500:][N], A["near_ans"][:500][N] + A["near_ans"][500:][N]
        ng = near_decode(model, nid, end, tok)
        tn = {d: (text_nll(model, A[d][S]) - A[d + "_nll"][S]) for d in ("docs", "prose")}
        au = audit_examples(model, tok, ex, decode="none") if ex else None
    R["unch"] = sum(a == b for a, b in zip(got, ans)) / len(ans)
    R["form"] = sum(bool(FORM.search(tok.decode(g))) and not FORM.search(tok.decode(b)) for g, b in zip(got, ans))
    kl, worst, _, tf = compare(model, A["everyday_ans_h"][S], he, ans); R["KLe"], R["KLe_max"], R["unch_tf"] = kl, worst, tf
    kl, worst, _, tf = compare(model, A["own_ans_h"][S], ho, A["own_ans"][S]); R["KLo"], R["unch_own_tf"] = kl, tf
    R["KLs"], _, R["chat"], _ = compare(model, A["own_sampled_h"][S], hs, A["own_sampled"][S])
    txt = [tok.decode(g) for g in ng]
    made = [bool(FORM.search(t)) for t in txt]; leak = [any(s in t for s in stored) for t in txt]
    R["made_near"], R["made_for"] = sum(made[:k]) / k, sum(made[k:]) / len(made[k:]); R["made"] = sum(made) / len(made)
    R["digit1"] = sum(t[:1].isdigit() for t in txt) / len(txt)
    R["leaks"] = sum(leak); R["n_near"] = len(made); R["near_unch"] = sum(a[:4] == b[:4] for a, b in zip(ng, nans)) / len(ng)
    R["docs"], R["prose"] = tn["docs"].mean().item(), tn["prose"].mean().item()
    if au: R["recit"], R["cert"], R["n"] = au.n_recalled, sum(r.passed for r in au.records), len(ex)
    R["eval_s"] = time.time() - t0
    R["examples"] = {"changed": [(tok.decode(i[24:])[-60:], tok.decode(b)[:60], tok.decode(g)[:60]) for i, b, g in zip(ids, ans, got) if b != g][:5]}
    if show: print(row(R), flush=True)
    return R

def row(R):
    return (f"unchanged {R['unch']:.3f} (tf {R['unch_tf']:.3f}, own {R['unch_own_tf']:.3f}) form {R['form']} KL everyday {R['KLe']:.4f} (max {R['KLe_max']:.2f}) own {R['KLo']:.4f} sampled {R['KLs']:.4f} | "
            f"leaks {R['leaks']}/{R['n_near']} made {R['made']:.3f} (near {R['made_near']:.3f} foreign {R['made_for']:.3f}) near unchanged {R['near_unch']:.3f} | dNLL docs {R['docs']:+.4f} prose {R['prose']:+.4f} chat {R['chat']:+.4f} | "
            f"recited {R.get('recit')}/{R.get('n')} certified {R.get('cert')} [{R['eval_s']:.0f}s]")

if __name__ == "__main__":
    from contextlib import nullcontext
    from memlaw.models import load_model
    t = time.time(); base = load_model(); print("loaded", round(time.time() - t, 1))
    t = time.time(); assets(base); print("assets", round(time.time() - t, 1), flush=True)
    if sys.argv[1] == "floor":
        # the bare model at another batch size
        A = assets(base)
        for bs in (16,):
            for k in ("everyday",):
                g = decode_all(base.model, A[k + "_ids"], A["end"], N_TOK, bs); print("floor", k, "batch", bs, "unchanged", sum(a == b for a, b in zip(g, A[k + "_ans"])) / len(g), flush=True)
        kl, worst, d, tf = compare(base.model, A["everyday_ans_h"], hidden_at(base.model, A["everyday_ids"], A["everyday_ans"], bs=7), A["everyday_ans"]); print("floor: teacher-forced unchanged", tf, "KL", kl, worst, flush=True)
        print("base near answers:", [base.tokenizer.decode(a) for a in A["near_ans"][::100]])
    else:
        ex = encode(book(), base.tokenizer, format="chat", max_tokens=base.context_length)
        evaluate(base, lambda: loaded_adapter(pathlib.Path(sys.argv[1]), base.model), ex, fast="--fast" in sys.argv)
