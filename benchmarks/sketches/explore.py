"""Experiments: python train.py NAME key=value ...  One adapter, its table, a line in runs/rows.jsonl."""
import sys, json, time, random, pathlib, math, torch
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import evaluate as E
from memlaw.models import load_model
from memlaw.records import encode, encode_prompt, Example, Record
from memlaw.adapters import resolve_sites, Adapter, save_adapter
from memlaw.cached import CachedEngine
from memlaw.engine import Job
from memlaw.head import head_losses
from memlaw.forward import logits_of
from memlaw.learner import Learner, TrainConfig, step_size
from memlaw.damage import windows, retained_text
from memlaw.precondition import _general, Statistics, Whitener, _inputs
from memlaw.recall import audit_examples

D = dict(layers="20,23,26", placement="down_proj", rank=21, n=100, seed=0, obj="sft", epochs=60, lr=1e-2, near=1600, near_k=1, pn=16, chats=200, chat_len=24, pc=2, ln=1.0, lc=1.0, prio=1,
         ret=150_000.0, joint=1, w_docs=1.0, w_text=1.0, w_chat=1.0, w_near=0.0, g_near="rec", unk="many", unkshare=0.5, white=0.9, damp=0.01, fast=1, save=0, texts=0, pt=0, lt=1.0, min_epochs=0, batch=0, maxs=400, hinge=0.0, hm=1.0, late=0, extra=0, w1=1.0, gate=0, glam=0.01, adapt=0.0, floor=0.1, padapt=0, padr=0, start=99.0, rate2=0, ema=0.0)

def corpora(base, end):
    """What belongs to the base model only; made once, kept on disk: chats (its own turns and answers), free text of its own, documentation."""
    f = E.HERE / "corpora.pt"
    if f.exists(): return torch.load(f, weights_only=False)
    tok, model = base.tokenizer, base.model; ban = E.forbidden(base)
    ps = [p for p in E.own_prompts(base, 180, 1, end) if p not in ban]
    w = ["What is", "Who is", "Where is", "Tell me about", "Why", "How", "Describe", "Name", "Explain", "List"]; t = ["the moon", "Paris", "a whale", "music", "bread", "gold", "the heart", "winter", "chess", "rain", "a car", "sleep", "Rome", "a poem", "love"]
    short = [f"{a} {b}{'?' if i < 6 else '.'}" for i, a in enumerate(w) for b in t]; random.Random(0).shuffle(short)
    ps += [p for p in short[:60] if p not in ban]
    ids = [list(encode_prompt(tok, p, "chat")) for p in ps]
    torch.manual_seed(2); ans = [None] * len(ids)  # every second answer sampled, the others greedy
    ans[::2] = E.sample_all(model, ids[::2], end, 32, 120); ans[1::2] = E.decode_all(model, ids[1::2], end, 32, 120)
    torch.manual_seed(3); bos = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
    start = torch.full((32, 1), tok.convert_tokens_to_ids("<|endoftext|>"))
    text = model.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, min_new_tokens=95, max_new_tokens=95, eos_token_id=end, pad_token_id=end)
    C = dict(prompts=ps, ids=ids, ans=ans, text=text, docs=windows(tok, retained_text(), context=base.context_length))
    torch.save(C, f); return C

def samples(model, sites, seqs, pick, seed=0, bs=16):
    """Inputs and output gradients of all sites at picked positions: [n, sum D_in], [n, sum D_out]."""
    by = {}; X, G = [], []
    for q in seqs: by.setdefault(len(q), []).append(list(q))
    for n, qs in by.items():
        for s in range(0, len(qs), bs):
            part = torch.tensor(qs[s:s + bs]); r = _general(model, sites, part, seed + s)
            X.append(torch.cat([pick(x.view(len(part), n, -1)).flatten(0, -2) for x, _ in r], 1)); G.append(torch.cat([pick(g.view(len(part), n, -1)).flatten(0, -2) for _, g in r], 1))
    return torch.cat(X), torch.cat(G)

ALL = (14, 17, 20, 22, 23, 24, 26, 28)
def general_samples(model, sites, C, npre):
    """Of the base only, so kept on disk: for all candidate layers at once."""
    path = E.HERE / "stats_all.pt"; every = resolve_sites(model, "down_proj", ALL)
    if path.exists(): gen = torch.load(path)
    else:
        gen = dict(docs=samples(model, every, C["docs"].tolist(), lambda v: v), text=samples(model, every, C["text"].tolist(), lambda v: v[:, 1:]),
                   chat=samples(model, every, [p + a for p, a in list(zip(C["ids"], C["ans"]))[:100]], lambda v: v[:, npre:]))
        gen = {k: (x.bfloat16(), g.bfloat16()) for k, (x, g) in gen.items()}; torch.save(gen, path)
    ix = [ALL.index(s.layer) for s in sites]; di, do = every[0].d_in, every[0].d_out
    return {k: (torch.cat([x[:, i * di:i * di + di] for i in ix], 1).float(), torch.cat([g[:, i * do:i * do + do] for i in ix], 1).float()) for k, (x, g) in gen.items()}

class Penalty:
    """1/2 sum_k w_k <A'S_k A, B G_k B'> with A, B block-diagonal over the sites (joint=0: no cross terms). Adds its gradient itself."""
    def __init__(self, adapter, sites, parts, joint):
        self.ad, self.parts = adapter, []
        self.di = torch.tensor([0] + [s.d_in for s in sites]).cumsum(0).tolist(); self.do = torch.tensor([0] + [s.d_out for s in sites]).cumsum(0).tolist()
        r = adapter.rank; self.mask = torch.block_diag(*[torch.ones(r, r)] * len(sites)) if not joint else None
        W = adapter.whiteners
        for w, x, g in parts:
            S = x if x.shape[0] == x.shape[1] else x.T @ x / len(x); g = g if x.shape[0] != x.shape[1] else g
            if W:  # into the coordinates that A is trained in
                S = torch.cat([W[i].apply(S[self.di[i]:self.di[i + 1]]) for i in range(len(sites))]); S = torch.cat([W[i].apply(S[:, self.di[i]:self.di[i + 1]].T).T for i in range(len(sites))], 1)
            self.parts.append((w, S.contiguous(), (g if x.shape[0] == x.shape[1] else g.T @ g / len(g)).contiguous()))
    @torch.no_grad()
    def add_gradient(self, weight):
        a, b = list(self.ad.a), list(self.ad.b); total = 0.0; r = self.ad.rank
        for w, S, G in self.parts:
            if not w: continue
            SA = torch.cat([S[:, self.di[i]:self.di[i + 1]] @ a[i] for i in range(len(a))], 1)  # [D_in, R]
            GB = torch.cat([G[:, self.do[i]:self.do[i + 1]] @ b[i].T for i in range(len(b))], 1)  # [D_out, R]
            AA = torch.cat([a[i].T @ SA[self.di[i]:self.di[i + 1]] for i in range(len(a))]); BB = torch.cat([b[i] @ GB[self.do[i]:self.do[i + 1]] for i in range(len(b))])
            if self.mask is not None: AA, BB = AA * self.mask, BB * self.mask
            total += 0.5 * w * float((AA * BB).sum())
            for i in range(len(a)):
                c = slice(i * r, i * r + r); k = weight * w
                if a[i].grad is None: a[i].grad = torch.zeros_like(a[i])
                if b[i].grad is None: b[i].grad = torch.zeros_like(b[i])
                a[i].grad += k * (SA[self.di[i]:self.di[i + 1]] @ BB[:, c]); b[i].grad += k * (AA[c] @ GB[self.do[i]:self.do[i + 1]].T)
        return total

class Hinge:
    """Linearised near misses, all of them every step: d_i = sum_s x_s A_s B_s g_s', the first-order change of log P(records' form) at the last prompt position; penalty mean relu(|d| - m)^2."""
    def __init__(self, adapter, sites, X, G, margin):
        self.ad, self.m = adapter, margin; self.X, self.G = [], []; a = b = 0
        for i, s in enumerate(sites):
            x = X[:, a:a + s.d_in]; self.X.append((adapter.whiteners[i].apply(x.T).T if adapter.whiteners else x).contiguous()); a += s.d_in
            self.G.append(G[:, b:b + s.d_out].contiguous()); b += s.d_out
    @torch.no_grad()
    def add_gradient(self, weight, n=2400):
        pick = torch.randint(len(self.X[0]), (min(n, len(self.X[0])),))
        a, b = list(self.ad.a), list(self.ad.b); d = 0; keep = []
        for X, G, A, B in zip(self.X, self.G, a, b):
            x, g = X[pick], G[pick]; p, q = x @ A, g @ B.T; d = d + (p * q).sum(1); keep.append((x, g, p, q))
        over = (d - self.m).clamp(min=0) - (-d - 3 * self.m).clamp(min=0); c = (2 * weight / len(pick) * over)[:, None]
        for (x, g, p, q), A, B in zip(keep, a, b):
            A.grad += x.T @ (c * q); B.grad += (c * p).T @ g
        return float((over ** 2).mean())

def soft(model, hidden, base_hidden, rows=128):
    """KL(base||adapted) [n] and its gradient at the hidden state [n, D]."""
    kl, grad = [], torch.empty_like(hidden)
    for s in range(0, len(hidden), rows):
        leaf = hidden[s:s + rows].detach().requires_grad_()
        with torch.no_grad(): zb = logits_of(model, base_hidden[s:s + rows])
        with torch.enable_grad(): z = logits_of(model, leaf)
        dz = torch.empty_like(z)
        for r in range(0, len(z), 16):
            lp, lq = zb[r:r + 16].float().log_softmax(1), z.detach()[r:r + 16].float().log_softmax(1); p = lp.exp()
            kl.append((p * (lp - lq)).sum(1)); dz[r:r + 16] = lq.exp_() - p
        (grad[s:s + rows],) = torch.autograd.grad(z, leaf, dz)
    return torch.cat(kl), grad

def main(name, **kw):
    c = dict(D); c.update({k: type(D[k])(float(v)) if isinstance(D[k], (int, float)) else v for k, v in kw.items()}); assert set(kw) <= set(D), set(kw) - set(D)
    c = type("C", (), c); print(name, kw, flush=True)
    torch.manual_seed(c.seed); rng = random.Random(c.seed)
    base = load_model(); model, tok = base.model, base.tokenizer
    recs = E.book(c.n) if c.n <= 100 else E.many(c.n)
    ex = encode(recs, tok, format="chat", max_tokens=base.context_length); end = ex[0].target_ids[-1]
    ban = E.forbidden(base, c.n); C = corpora(base, end)
    sites = resolve_sites(model, c.placement, tuple(int(x) for x in c.layers.split(",")))
    # near misses of training
    t0 = time.time(); nu = int(c.near * c.unkshare)
    near = E.make_near(recs, c.near - nu, 1000, ban); nr_ = len(near)
    if c.unk == "faker": near += E.make_foreign(recs, nu, 2000, ("en_US",), ban | set(near), strict=False)
    if c.unk == "many": near += E.make_foreign(recs, nu // 2, 2000, ("en_US",), ban | set(near), strict=False); near += E.make_foreign(recs, nu - nu // 2, 3000, ("da_DK", "fi_FI", "ro_RO", "cs_CZ", "hu_HU", "en_GB", "hr_HR", "es_MX", "fr_CA", "no_NO"), ban | set(near), strict=False)
    assert not set(near) & ban
    near_ids = [encode_prompt(tok, p, "chat") for p in near]
    fake = [C["ids"][0][0]]
    negs = [Example(record=Record(prompt=p, completion="x", id=f"n{i}"), prompt_ids=tuple(q), target_ids=(0,)) for i, (p, q) in enumerate(zip(near, near_ids))]
    chat_rows = list(range(len(C["ids"])))[: c.chats]
    for i in chat_rows: negs.append(Example(record=Record(prompt=C["prompts"][i], completion="x", id=f"c{i}"), prompt_ids=tuple(C["ids"][i]), target_ids=tuple(C["ans"][i][: c.chat_len])))
    allx = ex + negs; n_rec, n_near = len(ex), len(near)
    key = E.HERE / f"setup_{sites[0].layer}_{c.n}_{c.near}_{c.unkshare}_{c.unk}_0_{c.chats}_{c.chat_len}_{c.layers.replace(',', '_')}_{c.white}.pt"; kept = torch.load(key, weights_only=False) if key.exists() else {}
    if kept:
        def fill(self):
            self.returns_tuple = kept["rt"]; self.hidden.rows.copy_(kept["hidden"])
            if self.site_input is not None: self.site_input.rows.copy_(kept["site_in"])
        eng = type("Quick", (CachedEngine,), dict(_fill_cache=fill))(model, sites, allx)
    else: eng = CachedEngine(model, sites, allx)
    t_engine = time.time() - t0
    # statistics
    t1 = time.time(); gen = general_samples(model, sites, C, eng.n_prefix)
    t_general = time.time() - t1; t1 = time.time()
    if kept: wh = kept['wh']
    else:
        rec_in = _inputs(model, sites, ex)
        cut = torch.tensor([0] + [s.d_in for s in sites]).cumsum(0).tolist()
        wh = []
        for i, s in enumerate(sites):
            g = [gen[k][0][:, cut[i]:cut[i + 1]] for k in ("docs", "text", "chat")]
            S = sum(x.T @ x / len(x) for x in g) / 3; v, V = torch.linalg.eigh(S)
            wh.append(Whitener(Statistics(records_in=rec_in[i] / len(rec_in[i]) ** .5, general_in=v.clamp(min=0).sqrt()[:, None] * V.T, general_out=torch.zeros(1, s.d_out)), mixture=c.white, damping=c.damp))
    ad = Adapter(sites, rank=c.rank, seed=c.seed, whiteners=wh)
    gp = E.HERE / f"gram_{c.layers.replace(',', '_')}.pt"
    if gp.exists(): gram = torch.load(gp)
    else: gram = {k: (x.T @ x / len(x), g.T @ g / len(g)) for k, (x, g) in gen.items()}; torch.save(gram, gp)
    parts = [(c.w_docs, *gram["docs"]), (c.w_text, *gram["text"]), (c.w_chat, *gram["chat"])]
    t_stats = time.time() - t1; t1 = time.time()
    # the base's last hidden states of all negatives
    if kept: base_h, keys = kept['base_h'], kept['keys']
    else:
        base_h, keys = [], []
        with torch.no_grad():
            for s in range(0, len(negs), 400):
                for trees in eng._packs([list(range(n_rec + s, min(n_rec + s + 400, len(allx))))]):
                    pack = eng._pack([tr for _, tr in trees]); at = []
                    with eng._shortened(pack, [(ad, 0)]):
                        hs = [model.get_submodule(x.module).register_forward_pre_hook(lambda m, i: at.append(i[0][0][pack.keep].clone())) for x in sites]
                        base_h.append(eng._run(pack)[pack.keep].clone())
                        for x in hs: x.remove()
                    keys.append(torch.cat(at, 1))
        torch.save(dict(rt=eng.returns_tuple, hidden=eng.hidden.rows, site_in=eng.site_input.rows if eng.site_input is not None else None, wh=wh, base_h=base_h, keys=keys), key)
    base_h = torch.cat(base_h); lens = [len(e.target_ids) for e in negs]; off = torch.tensor([0] + lens).cumsum(0).tolist()
    t_base = time.time() - t1; t1 = time.time()
    if c.gate: set_gate(model, eng, sites, ad, ex, torch.cat(keys), gen, n_near, c.glam)
    hinge = None
    if c.w_near or c.hinge:
        Xn = torch.cat(keys)[:n_near].float()
        if c.hinge: hinge = Hinge(ad, sites, Xn, form_gradients(model, sites, near_ids, ex), c.hm)
        if c.w_near:
            Gn = form_gradients(model, sites, [e.prompt_ids for e in ex], ex); parts.append((c.w_near / (c.ret / max(sum(len(e.target_ids) for e in ex), 1000) / (c.w_docs + c.w_text + c.w_chat)), Xn, Gn))
    pen = Penalty(ad, sites, parts, c.joint); tot_w = sum(p[0] for p in parts[:3])
    t_stats += time.time() - t1
    cfg = TrainConfig(objective=c.obj, retention=0.0, seed=c.seed, learning_rate=c.lr, batch_size=c.batch or "auto")
    L = Learner(ad, ex, cfg, max_epochs=1000 if c.obj == "triage" else None)
    last = torch.full((len(negs),), 1.0); lasthit = []
    n_tok = sum(len(e.target_ids) for e in ex); weight = c.ret / max(n_tok, 1000) / max(tot_w, 1e-9); tt = time.time(); spent = dict(fwd=0, head=0, bwd=0, pen=0)
    def draw(lo, hi, k):
        if not k: return []
        if not c.prio: return rng.sample(range(lo, hi), k)
        return (lo + torch.multinomial(last[lo:hi] + 0.02, k)).tolist()
    avg = []; certified = False; hist = []; active = c.start > 90; full_parts = list(pen.parts)
    print(f"setup: engine {t_engine:.1f} general (kept for the base) {t_general:.1f} stats {t_stats:.1f} base {t_base:.1f} s; numbers {ad.n_parameters}; step {L.batch_size}", flush=True)
    while L.epoch < c.epochs:
        nll_sum = 0; kn, kc, f1 = [], [], []; P = Hn = 0
        for rows in L.batches():
            pn = c.pn if L.epoch >= c.late else 0; up = 1 / max(c.adapt, L.rate_share) if c.adapt else 1.0; pn = int(pn * up) if c.padapt else pn
            ni = draw(0, n_near, pn) + draw(n_near, len(negs), c.pc) if active else []; pen.parts = full_parts if active else full_parts[:3]; s0 = time.time()
            parts_ = list(eng._hidden([Job(ad, rows + [n_rec + i for i in ni])])); hid, tg = torch.cat([h for h, _ in parts_]), torch.cat([t for _, t in parts_]); s1 = time.time()
            m = sum(len(ex[r].target_ids) for r in rows); leaf = hid.detach().requires_grad_()
            ls = head_losses(lambda h: logits_of(model, h), leaf[:m], tg[:m], dense=torch.ones(m, dtype=torch.bool), max_rows=512)
            wts = L.weigh(rows, ls.nll, ls.correct)
            fi = torch.tensor([0] + [len(ex[r].target_ids) for r in rows[:-1]]).cumsum(0); f1.append(ls.nll[fi])
            if c.w1 != 1 and active: wts = wts.clone(); wts[fi] *= c.w1; wts /= wts.sum().clamp(min=1e-9)
            L.see(rows, ls.nll); nll_sum += float(ls.nll.sum())
            L.optimizer.zero_grad(); ls.backward(wts); grad = leaf.grad
            if ni:
                bh = torch.cat([base_h[off[i]:off[i + 1]] for i in ni]); kl, g = soft(model, hid[m:].detach(), bh)
                ln = [lens[i] for i in ni]; k_ = sum(1 for i in ni if i < n_near); nt = sum(ln[:k_]); ct = len(kl) - nt
                w = torch.cat([torch.full((nt,), up * c.ln / max(nt, 1)), torch.full((ct,), up * c.lc / max(ct, 1))]); grad[m:] += (w[:, None] * g).to(grad.dtype)
                for i, x in zip(ni, kl.split(ln)): last[i] = x.mean()
                if nt: kn.append(kl[:nt])
                if ct: kc.append(kl[nt:])
            s2 = time.time(); hid.backward(grad); s3 = time.time()
            if c.ret: P = pen.add_gradient(weight * (up if c.padr else 1))
            if hinge: Hn = hinge.add_gradient(c.hinge)
            L.step()
            if c.ema and active:
                with torch.no_grad():
                    if not avg: avg += [p.detach().clone() for p in ad.parameters()]
                    else:
                        for q, p in zip(avg, ad.parameters()): q.lerp_(p, 1 - c.ema)
            s4 = time.time()
            for k, v in zip(spent, (s1 - s0, s2 - s1, s3 - s2, s4 - s3)): spent[k] += v
        nll = nll_sum / n_tok; L.end_epoch(nll); L.rate_share = max(c.floor, L.rate_share)
        if c.rate2 and active: L.rate_share = max(c.floor, min(1.0, ((nll + float(torch.cat(f1).mean())) / 2) ** 0.5))
        active = active or nll < c.start; u = L.n_under(range(n_rec)); el = time.time() - tt
        f = lambda x: f"{torch.cat(x).mean():.3f} (>1: {(torch.cat(x) > 1).float().mean():.3f})" if x else "-"
        hist.append((L.epoch, el, nll, u))
        print(f"epoch {L.epoch} {el:.0f}s nll {nll:.3f} first {torch.cat(f1).mean():.3f} under {u} KL near {f(kn)} chat {f(kc)} penalty {P:.4f} hinge {Hn:.3f}", flush=True)
        if avg and u < 20:  # the mean of the last steps' weights: is it certified?
            now = [p.detach().clone() for p in ad.parameters()]
            with torch.no_grad():
                for q, p in zip(avg, ad.parameters()): p.copy_(q)
            with ad.folded().attached(model): au = audit_examples(model, tok, ex, decode="none")
            np_ = sum(r.passed for r in au.records); print(f"   mean weights: {np_} pass", flush=True); certified = np_ == n_rec and L.epoch >= c.min_epochs
            if certified or el > c.maxs: break
            with torch.no_grad():
                for q, p in zip(now, ad.parameters()): p.copy_(q)
            el = time.time() - tt
        if el > c.maxs and u > 0: break
        if u == 0 and L.epoch >= c.min_epochs:
            with ad.folded().attached(model): au = audit_examples(model, tok, ex, decode="none")
            certified = sum(r.passed for r in au.records) == n_rec
            if certified: break
            L.raise_goal()
    el = time.time() - tt; steps = L.n_steps
    print(f"trained {el:.0f}s {L.epoch} epochs {el / max(steps, 1):.3f} s/step certified {certified}; spent {({k: round(v / steps, 3) for k, v in spent.items()})}", flush=True)
    R = E.evaluate(base, lambda: ad.folded().attached(model), ex, fast=bool(c.fast), n_records=c.n)
    R.update(name=name, kw=kw, train_s=el, epochs=L.epoch, s_step=el / max(steps, 1), numbers=ad.n_parameters, certified=certified, setup=dict(engine=t_engine, stats=t_stats, base=t_base, general=t_general), hist=hist)
    with open(str(pathlib.Path(__file__).parent) + "/runs/rows.jsonl", "a") as fo: fo.write(json.dumps(R) + "\n")
    if c.save:
        out = pathlib.Path(fstr(pathlib.Path(__file__).parent) + "/runs/{name}"); out.mkdir(exist_ok=True); save_adapter(ad, out, base_path=base.path, base_sha256=base.sha256)
    for e in R["examples"]["changed"]: print("   ", e)
    return R

@torch.no_grad()
def near_keys(model, sites, ids, bs=64):
    """What each site reads at the last prompt position: [N, sum D_in]."""
    by, X = {}, torch.empty(len(ids), sum(s.d_in for s in sites)); at = []
    hs = [model.get_submodule(s.module).register_forward_pre_hook(lambda m, i: at.append(i[0][:, -1].float())) for s in sites]
    for i, q in enumerate(ids): by.setdefault(len(q), []).append(i)
    for ii in by.values():
        for s in range(0, len(ii), bs): at.clear(); model.base_model(torch.tensor([list(ids[j]) for j in ii[s:s + bs]]), use_cache=False); X[ii[s:s + bs]] = torch.cat(at, 1)
    for h in hs: h.remove()
    return X

def form_gradients(model, sites, ids, ex, bs=32):
    """Gradient at each site's output, last prompt position, of log P(first tokens of the records' answers): [N, sum D_out]."""
    first = sorted({e.target_ids[0] for e in ex}); by, G = {}, torch.empty(len(ids), sum(s.d_out for s in sites))
    for i, q in enumerate(ids): by.setdefault(len(q), []).append(i)
    for ii in by.values():
        for s in range(0, len(ii), bs):
            probes = []
            def hook(m, i, o): z = torch.zeros_like(o[:, -1], dtype=torch.float32, requires_grad=True); probes.append(z); o = o.clone(); o[:, -1] += z.to(o.dtype); return o
            hs = [model.get_submodule(x.module).register_forward_hook(hook) for x in sites]
            h = model.base_model(torch.tensor([list(ids[j]) for j in ii[s:s + bs]]), use_cache=False).last_hidden_state[:, -1]
            for x in hs: x.remove()
            z = logits_of(model, h).float(); (z[:, first].logsumexp(1) - z.logsumexp(1)).sum().backward()
            G[ii[s:s + bs]] = torch.cat([p.grad for p in probes], 1)
    return G

@torch.no_grad()
def set_gate(model, eng, sites, ad, ex, keys, gen, n_near, lam):
    """The adapters' first direction by ridge: 1 on the records' last prompt position, 0 on near misses' and on chats, documentation and
    text, over all sites together; its output is the direction that raises log P(first answer tokens), as strong as makes them likely."""
    t0 = time.time(); n_rec = len(ex); at, first = [], torch.tensor([0] + [len(e.target_ids) for e in ex[:-1]]).cumsum(0)
    pack = eng._pack([tr for _, tr in next(eng._packs([list(range(n_rec))]))]); assert len(pack.target_ids) == sum(len(e.target_ids) for e in ex)
    with eng._shortened(pack, [(ad, 0)]):
        hs = [model.get_submodule(x.module).register_forward_pre_hook(lambda m, i: at.append(i[0][0][pack.keep][first].float())) for x in sites]
        eng._run(pack)
        for x in hs: x.remove()
    g = torch.Generator().manual_seed(0); rest = [gen[k][0][torch.randperm(len(gen[k][0]), generator=g)[:n]] for k, n in (("chat", 800), ("docs", 250), ("text", 250))]
    X = torch.cat([torch.cat(at, 1), keys[:n_near].float(), *rest]); y = (torch.arange(len(X)) < n_rec).float(); w = 1 + 9 * y
    cut = torch.tensor([0] + [s.d_in for s in sites]).cumsum(0).tolist()
    Z = torch.cat([ad.whiteners[i].apply(X[:, cut[i]:cut[i + 1]].T).T for i in range(len(sites))], 1)
    K = Z @ Z.T; m = K.diag()[: n_rec + n_near].mean(); v = Z.T @ torch.linalg.solve(K + lam * m * torch.diag(1 / w), y); s = Z @ v
    print(f"gate: records {s[:n_rec].mean():.2f} lowest 5 % {s[:n_rec].quantile(.05):.2f}; near misses {s[n_rec:n_rec + n_near].mean():.3f}, sd {s[n_rec:n_rec + n_near].std():.3f}, general sd {s[n_rec + n_near:].std():.3f}", flush=True)
    with torch.enable_grad(): G = form_gradients(model, sites, [e.prompt_ids for e in ex], ex)
    u = G[:, -sites[-1].d_out:].mean(0); u = u / u.norm()
    k = 0.58 / max(float(v[cut[i]:cut[i + 1]].norm()) for i in range(len(sites)))
    digits = torch.tensor(sorted({e.target_ids[0] for e in ex})); rows = list(range(n_rec)) + [n_rec + j for j in range(0, min(n_near, 1200), 12)]
    where = torch.cat([first, sum(len(e.target_ids) for e in ex) + torch.arange(len(rows) - n_rec)])
    for alpha in (16, 32, 64, 96, 128, 192, 256, 384):
        for i in range(len(sites)): ad.a[i][:, 0] = k * v[cut[i]:cut[i + 1]]; ad.b[i][0] = alpha / k * u
        h = torch.cat([h for h, _ in eng._hidden([Job(ad, rows)])])[where]; p = logits_of(model, h).float().softmax(1)[:, digits].sum(1)
        print(f"   strength {alpha}: P(form) records {p[:n_rec].mean():.3f} near misses {p[n_rec:].mean():.4f} (over half: {(p[n_rec:] > .5).float().mean():.3f})", flush=True)
        if p[:n_rec].mean() > 0.6: break
    print(f"gate took {time.time() - t0:.1f} s", flush=True)

if __name__ == "__main__":
    main(sys.argv[1], **dict(a.split("=", 1) for a in sys.argv[2:]))
