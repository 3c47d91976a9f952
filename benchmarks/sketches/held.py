"""The finalist, alone and exact: python finalist.py NAME seed=0 n=100 [fast=0]. Everything else (train.py) is exploration.

Symbols: sites s (down_proj of a few layers from two thirds up), A_s [D_in, R], B_s [R, D_out]; x_s what site s reads, g_s the gradient at
its output. Concatenated over sites: x [sum D_in], A and B block-diagonal, so that what the adapter adds to the residual stream is x A B summed over the sites.

Loss of a step = records + near + chat + retention + near_closed; near, chat, near_closed and FIRST only once the last epoch's mean nll was under START:
  records     = sum w nll / sum w, w = FIRST on each record's first answer token, else 1 (a fifth of the records a step)
  near        = NEAR * mean KL(base || adapted) at the first answer position of near misses          (N_NEAR of POOL a step, drawn in proportion to their last KL + 0.02)
  chat        = CHAT * mean KL(base || adapted) over 24 answer positions of chats of the base's own  (N_CHAT of 200 a step, drawn likewise)
  retention   = RETAIN / max(1000, target tokens) * mean_k 1/2 <A' S_k A, B G_k B'>, S_k = E[x x'], G_k = E[g g'] over all sites TOGETHER (cross terms kept); k: docs, own text, own chats. From the first step on.
  near_closed = CLOSED * 1/2 <A' S_n A, B G_n B'>, S_n over all near misses' last prompt positions; G_n of d log P(any record's first token) at the records' last prompt positions
AdamW (0.9, 0.99), gradient norm clipped to 1, rate RATE * clamp(sqrt(mean nll of the last epoch), FLOOR, 1). What is certified and saved is the running mean of the weights
(q += (1 - MEAN) (p - q) after each step since START). Every third epoch, once fewer than a fifth of the records have a token under
the line: audit the mean weights; if all pass keep them, and near, chat, retention and near_closed weigh 1.6 times as much from then on (`push`, 8 at most); if fewer than 97 % pass,
a fifth less (1 at least). Trains on to the end of its time; the latest mean weights that passed are the result.
"""
import sys, json, time, random, pathlib, torch
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
import evaluate as E
from explore import corpora, general_samples, soft, form_gradients  # what the base says (kept on disk), exact KL and its gradient, d log P(form)
from memlaw.models import load_model
from memlaw.records import encode, encode_prompt, Example, Record
from memlaw.adapters import resolve_sites, Adapter, save_adapter
from memlaw.cached import CachedEngine
from memlaw.engine import Job
from memlaw.head import head_losses
from memlaw.forward import logits_of
from memlaw.learner import Learner, TrainConfig
from memlaw.precondition import Statistics, Whitener, _inputs
from memlaw.recall import audit_examples

LAYERS, RANK = (20, 23, 26), 21
FIRST, NEAR, CHAT, START, MEAN, FLOOR = 5.0, 0.4, 1.0, 1.6, 0.95, 0.3
POOL, UNKNOWN, N_NEAR, N_CHAT = 1600, 0.3, 24, 2
RETAIN, WEIGHTS, CLOSED, RATE = 150_000.0, dict(docs=1.0, text=1.0, own=1.0, every=1.0), 0.1, 1.5e-2
SITES, BATCH, CLEN, COWN, CEVERY, MARKOV, PUSH, W1R, LAST, JW, DAMP = "d20,d23,d26", 20, 24, 200, 400, 0.0, 1.6, 0.0, 0.02, 0, 0.01


class Joint:
    """A_s = sum_t W_st A'_t: whitening over all sites together."""
    def __init__(self, W, cuts, n): self.W, self.cuts, self.n, self.ad = W, cuts, n, None
    def apply(self, a):  # of the adapter's own A only
        return self.W[self.cuts[self.n]] @ torch.cat(list(self.ad.a))


class JointQuadratic:
    """sum_k c_k 1/2 <A' S_k A, B G_k B'>, A and B block-diagonal over the sites: adds its gradient by hand, one product S A and one G B' a term."""

    def __init__(self, adapter, terms):
        self.ad = adapter; self.i = _cuts(s.d_in for s in adapter.sites); self.o = _cuts(s.d_out for s in adapter.sites)
        self.joint = adapter.whiteners[0].W if isinstance(adapter.whiteners[0], Joint) else None
        self.terms = [(c, S.contiguous() if self.joint is not None else self._white(S), G) for c, S, G in terms]

    def _white(self, S):  # A = W A': S becomes W' S W
        for _ in range(2): S = torch.cat([w.apply(S[i]) for w, i in zip(self.ad.whiteners, self.i)]).T
        return S.contiguous()

    @torch.no_grad()
    def add_gradient(self, closed, push):
        a, b = self.ad.a, self.ad.b; r = self.ad.rank; total = 0.0; ga = [torch.zeros_like(x) for x in a]
        if self.joint is not None: a = (self.joint @ torch.cat(list(a))).split([x.shape[0] for x in a])
        for c, S, G in self.terms if closed else self.terms[:-1]:
            c *= push; SA = torch.cat([S[:, i] @ x for i, x in zip(self.i, a)], 1); GB = torch.cat([G[:, o] @ y.T for o, y in zip(self.o, b)], 1)
            AA = torch.cat([x.T @ SA[i] for i, x in zip(self.i, a)]); BB = torch.cat([y @ GB[o] for o, y in zip(self.o, b)]); total += 0.5 * c * float((AA * BB).sum())
            for n, (i, o) in enumerate(zip(self.i, self.o)):
                at = slice(n * r, n * r + r); ga[n] += c * (SA[i] @ BB[:, at]); b[n].grad += c * (AA[at] @ GB[o].T)
        if self.joint is not None: ga = (self.joint.T @ torch.cat(ga)).split([len(x) for x in ga])
        for p, g in zip(self.ad.a, ga): p.grad += g
        return total


@torch.no_grad()
def _mean(mean, ad):
    if mean is None: return [p.detach().clone() for p in ad.parameters()]
    for q, p in zip(mean, ad.parameters()): q.lerp_(p, 1 - MEAN)
    return mean


@torch.no_grad()
def _put(ad, weights):
    for p, q in zip(ad.parameters(), weights): p.copy_(q)


def _cuts(widths):
    out, at = [], 0
    for w in widths: out.append(slice(at, at + w)); at += w
    return out


def invented(recs, m, seed, ban):
    rng = random.Random(seed); nx = {}
    for r in recs:
        for w in r.prompt.rstrip(":").split():
            w = "^^" + w + "$"
            for i in range(len(w) - 2): nx.setdefault(w[i:i + 2], []).append(w[i + 2])
    def word():
        while True:
            w = "^^"
            while not w.endswith("$") and len(w) < 16: w += rng.choice(nx[w[-2:]])
            if w.endswith("$") and 3 <= len(w) - 3 <= 12: return w[2:-1]
    have = {w for r in recs for w in r.prompt.rstrip(":").split()}; out = []
    while len(out) < m:
        a, b = word(), word(); p = f"{a} {b}:"
        if a in have or b in have or p in ban or p in out: continue
        out.append(p)
    return out


def fill(engine, model, sites, adapter, rows):
    """The bare model on negatives, from the lowest site up: final hidden states and what every site reads, at the positions before targets."""
    hidden, keys = [], []
    with torch.no_grad():
        for start in range(0, len(rows), 400):
            for trees in engine._packs([rows[start:start + 400]]):
                pack = engine._pack([t for _, t in trees]); at = []
                with engine._shortened(pack, [(adapter, 0)]):
                    hooks = [model.get_submodule(s.module).register_forward_pre_hook(lambda m, i: at.append(i[0][0][pack.keep].clone())) for s in sites]
                    hidden.append(engine._run(pack)[pack.keep].clone())
                    for h in hooks: h.remove()
                keys.append(torch.cat(at, 1))
    return torch.cat(hidden), torch.cat(keys)


def main(name, seed=0, n=100, fast=0, epochs=70, save=1, budget=360, **over):
    globals().update({k: type(globals()[k])(v) if not isinstance(globals()[k], (tuple, dict)) else v for k, v in over.items()})
    torch.manual_seed(seed); base = load_model(); model, tok = base.model, base.tokenizer
    recs = E.book(n) if n <= 100 else E.many(n); ex = encode(recs, tok, format="chat", max_tokens=base.context_length); end = ex[0].target_ids[-1]
    ban = E.forbidden(base, n); T = [time.time()]
    K = torch.load(E.HERE / "gram2.pt", mmap=True); names = [("d" if "down" in m else "g") + str(l) for m, l, _, _ in K["sites"]]
    want = SITES.split(","); sites = [s for w in want for s in resolve_sites(model, "down_proj" if w[0] == "d" else "gate_proj", (int(w[1:]),))]
    ci, co = _cuts(x[2] for x in K["sites"]), _cuts(x[3] for x in K["sites"]); ix = [names.index(w) for w in want]
    sub = lambda M, cuts: torch.cat([torch.cat([M[cuts[i], cuts[j]] for j in ix], 1) for i in ix]).clone()
    gram = {k: (sub(S, ci), sub(G, co)) for k, (S, G) in K["out"].items()}
    own, every = torch.load(E.HERE / "corp2_own.pt", weights_only=False), torch.load(E.HERE / "corp2_rest.pt", weights_only=False)
    # near misses: recombined words of the records, and unknown names
    nu = int(POOL * UNKNOWN); near = E.make_near(recs, POOL - nu, 1000, ban)
    if MARKOV: near += invented(recs, int(nu * MARKOV), 4000, ban | set(near))
    nu = POOL - len(near)
    near += E.make_foreign(recs, nu // 2, 2000, ("en_US",), ban | set(near), strict=False)
    near += E.make_foreign(recs, nu - nu // 2, 3000, ("da_DK", "fi_FI", "ro_RO", "cs_CZ", "hu_HU", "en_GB", "hr_HR", "es_MX", "fr_CA", "no_NO"), ban | set(near), strict=False)
    assert not set(near) & ban
    ask = lambda p, i, ids, t: Example(record=Record(prompt=p, completion="x", id=i), prompt_ids=tuple(ids), target_ids=tuple(t))
    negs = [ask(p, f"n{i}", encode_prompt(tok, p, "chat"), (0,)) for i, p in enumerate(near)]
    half = lambda c, m: [(c["ids"][i], (c["greedy"] if i % 2 else c["sampled"])[i]) for i in range(min(m, len(c["ids"])))]
    for nm, c, m in (("o", own, COWN), ("e", every, CEVERY)): negs += [ask(f"{nm}{i}", f"{nm}{i}", q, a[:CLEN]) for i, (q, a) in enumerate(half(c, m)) if len(q) < 140]
    allx, n_rec, n_near = ex + negs, len(ex), len(near)
    key = E.HERE / f"set2_{n}_{POOL}_{UNKNOWN}_{MARKOV}_{COWN}_{CEVERY}_{CLEN}_{SITES.replace(',', '_')}.pt"; kept = torch.load(key, weights_only=False) if key.exists() else None; engine_of = CachedEngine
    if kept:
        def fill_cache(self): self.returns_tuple = kept["rt"]; self.hidden.rows.copy_(kept["hidden"])
        engine_of = type("Quick", (CachedEngine,), dict(_fill_cache=fill_cache))
    engine = engine_of(model, sites, allx); T.append(time.time())
    rec_in = _inputs(model, sites, ex); whiteners = []; T.append(time.time())
    for i, site, x in zip(_cuts(s.d_in for s in sites), sites, rec_in) if not kept else ():
        v, V = torch.linalg.eigh(sum(S[i, i] for S, _ in gram.values()) / len(gram))
        whiteners.append(Whitener(Statistics(records_in=x / len(x) ** 0.5, general_in=v.clamp(min=0).sqrt()[:, None] * V.T, general_out=torch.zeros(1, site.d_out)), mixture=0.9, damping=0.01))
    wh = whiteners or kept["wh"]
    if JW:
        cuts = _cuts(s.d_in for s in sites); X = torch.cat(rec_in, 1); S = 0.9 * sum(S for S, _ in gram.values()) / len(gram) + 0.1 * X.T @ X / len(X)
        d = S.diagonal(); eps = DAMP * torch.cat([torch.full((s.d_in,), float(d[c].mean())) for s, c in zip(sites, cuts)]); S = S + torch.diag(eps)
        if JW == 1: v, V = torch.linalg.eigh(S); W = (V * v.clamp(min=1e-12).rsqrt()) @ V.T
        else: W = torch.linalg.inv(torch.linalg.cholesky(S)).T.contiguous()
        W *= float(X.norm() / (X @ W).norm()); wh = [Joint(W, cuts, i) for i in range(len(sites))]; print("joint", round(time.time() - T[-1], 1))
    ad = Adapter(sites, rank=RANK, seed=seed, whiteners=wh); T.append(time.time())
    for w in wh:
        if JW: w.ad = ad
    base_h, keys = (kept["base_h"], kept["keys"]) if kept else fill(engine, model, sites, ad, list(range(n_rec, len(allx)))); T.append(time.time())
    if not kept: torch.save(dict(rt=engine.returns_tuple, hidden=engine.hidden.rows, wh=whiteners, base_h=base_h, keys=keys), key)
    Xn, Gn = keys[:n_near].float(), form_gradients(model, sites, [e.prompt_ids for e in ex[:100]], ex)
    n_tok = sum(len(e.target_ids) for e in ex); k = RETAIN / max(n_tok, 1000) / sum(WEIGHTS.values())
    quadratic = JointQuadratic(ad, [(k * w, *gram[c]) for c, w in WEIGHTS.items()] + [(CLOSED, Xn.T @ Xn / len(Xn), Gn.T @ Gn / len(Gn))])
    T.append(time.time()); setup = dict(zip(("engine", "whiten", "adapter", "base on negatives", "quadratic"), [round(b - a, 1) for a, b in zip(T, T[1:])])); print("setup", setup, "numbers", ad.n_parameters, flush=True)
    batch = max(BATCH, -(-n_rec // 5)) if n_rec > 20 else 10
    L = Learner(ad, ex, TrainConfig(objective="sft", retention=0.0, seed=seed, learning_rate=RATE, batch_size=batch)); head = lambda h: logits_of(model, h)
    lens = [len(e.target_ids) for e in negs]; off = torch.tensor([0] + lens).cumsum(0).tolist(); last = torch.ones(len(negs)); start = time.time(); certified = active = False; hist, mean, best, push, looked, cert_s = [], None, None, 1.0, 0, None
    draw = lambda lo, hi, m: (lo + torch.multinomial(last[lo:hi] + LAST, m)).tolist()
    while L.epoch < epochs:
        nll_sum, kn, kc, f1 = 0.0, [], [], []
        for rows in L.batches():
            pick = draw(0, n_near, int(N_NEAR)) + draw(n_near, len(negs), int(N_CHAT)) if active else []
            parts = list(engine._hidden([Job(ad, rows + [n_rec + i for i in pick])])); hidden, target = torch.cat([h for h, _ in parts]), torch.cat([t for _, t in parts])
            m = sum(len(ex[r].target_ids) for r in rows); leaf = hidden.detach().requires_grad_()
            losses = head_losses(head, leaf[:m], target[:m], dense=torch.ones(m, dtype=torch.bool), max_rows=512)
            w = L.weigh(rows, losses.nll, losses.correct).clone(); first = torch.tensor([0] + [len(ex[r].target_ids) for r in rows[:-1]]).cumsum(0)
            if active: w[first] *= FIRST; w /= w.sum().clamp(min=1e-9)
            L.see(rows, losses.nll); nll_sum += float(losses.nll.sum()); f1.append(losses.nll[first]); L.optimizer.zero_grad(); losses.backward(w)
            if pick:
                kl, g = soft(model, hidden[m:].detach(), torch.cat([base_h[off[i]:off[i + 1]] for i in pick])); nn = int(N_NEAR)
                share = torch.cat([torch.full((nn,), push * NEAR / nn), torch.full((len(kl) - nn,), push * CHAT / (len(kl) - nn))]); leaf.grad[m:] += (share[:, None] * g).to(leaf.grad.dtype)
                for i, x in zip(pick, kl.split([lens[i] for i in pick])): last[i] = x.mean()
                kn.append(kl[:nn]); kc.append(kl[nn:])
            hidden.backward(leaf.grad); penalty = quadratic.add_gradient(active, push); L.step()
            if active: mean = _mean(mean, ad)
        nll = nll_sum / n_tok; L.end_epoch(nll); L.rate_share = max(FLOOR, L.rate_share); active = active or nll < START; under = L.n_under(range(n_rec)); el = time.time() - start; hist.append((L.epoch, el, nll_sum / n_tok, under))
        print(f"epoch {L.epoch} {el:.0f}s nll {nll_sum / n_tok:.3f} first {torch.cat(f1).mean():.3f} under {under} KL near {torch.cat(kn or [torch.zeros(1)]).mean():.3f} chat {torch.cat(kc or [torch.zeros(1)]).mean():.4f} penalty {penalty:.3f}", flush=True)
        if mean and (under < n_rec / 5 or certified) and (L.epoch - looked >= 3 or el > budget - 8):  # what do the mean weights know?
            now = [p.detach().clone() for p in ad.parameters()]; _put(ad, mean); looked = L.epoch
            with ad.folded().attached(model): passed = sum(r.passed for r in audit_examples(model, tok, ex, decode="none").records)
            if passed == n_rec: best = [p.detach().clone() for p in mean]; cert_s = cert_s or time.time() - start; push = min(20.0, push * PUSH)
            elif passed < 0.97 * n_rec: push = max(1.0, push / 1.25)
            print(f"   mean weights: {passed} pass, push {push:.2f}", flush=True); certified = certified or passed == n_rec; _put(ad, now)
        if el > budget: break
    _put(ad, best or mean)
    el = time.time() - start; steps = L.n_steps; print(f"trained {el:.0f}s {L.epoch} epochs {el / steps:.3f} s/step certified {certified} first at {cert_s} s", flush=True)
    R = E.evaluate(base, lambda: ad.folded().attached(model), ex, fast=bool(fast), n_records=n)
    R.update(name=name, seed=seed, train_s=el, epochs=L.epoch, s_step=el / steps, numbers=ad.n_parameters, certified=certified, cert_s=cert_s, setup=setup, hist=hist)
    with open(str(pathlib.Path(__file__).parent) + "/runs/rows.jsonl", "a") as f: f.write(json.dumps(R) + "\n")
    if save: out = pathlib.Path(str(pathlib.Path(__file__).parent) + f"/runs/{name}"); out.mkdir(exist_ok=True); save_adapter(ad, out, base_path=base.path, base_sha256=base.sha256)
    for e in R["examples"]["changed"]: print("   ", e)


if __name__ == "__main__":
    kw = {k: v if k == "SITES" else float(v) if "." in v else int(v) for k, v in (a.split("=") for a in sys.argv[2:])}; main(sys.argv[1], **kw)
