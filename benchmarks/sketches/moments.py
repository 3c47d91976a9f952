import sys, json, time, random, torch
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
import evaluate as E
from memlaw.models import load_model
from memlaw.adapters import resolve_sites
from memlaw.precondition import _general
base = load_model(); model = base.model
DOWN = (20, 22, 23, 24, 26, 28)
sites = list(resolve_sites(model, "down_proj", DOWN)) + list(resolve_sites(model, "gate_proj", (20,)))
own, every = torch.load("evaldata/corp2_own.pt", weights_only=False), torch.load("evaldata/corp2_rest.pt", weights_only=False)
npre = 0
while len({x[npre] for x in own["ids"]}) == 1: npre += 1
print("prefix", npre)
def seqs(c, n, seed):
    rng = random.Random(seed); rows = [p + a for k in ("greedy", "sampled") for p, a in zip(c["ids"], c[k]) if a is not None]; rng.shuffle(rows); return rows[:n]
dom = dict(docs=(own["docs"].tolist(), 0), text=(own["text"].tolist(), 1), own=(seqs(own, 500, 0), -1), every=(seqs(every, 560, 1), -1))
di, do = sum(s.d_in for s in sites), sum(s.d_out for s in sites)
out = {}
for k, (rows, skip) in dom.items():
    t = time.time(); S, G, n = torch.zeros(di, di), torch.zeros(do, do), 0
    by = {}
    for q in rows: by.setdefault(len(q), []).append(q)
    X, Y = [], []
    def flush():
        global n
        x, y = torch.cat(X), torch.cat(Y); S.addmm_(x.T, x); G.addmm_(y.T, y); n += len(x); X.clear(); Y.clear()
    for L, qs in by.items():
        for s in range(0, len(qs), 8):
            part = torch.tensor(qs[s:s + 8]); r = _general(model, sites, part, 1000 * L + s)
            a = npre if skip < 0 and L > npre else max(skip, 0)
            pick = lambda v: v.view(len(part), L, -1)[:, a:].flatten(0, 1)
            X.append(torch.cat([pick(x) for x, _ in r], 1)); Y.append(torch.cat([pick(g) for _, g in r], 1))
            if sum(map(len, X)) > 3000: flush()
    if X: flush()
    out[k] = (S / n, G / n); print(k, n, round(time.time() - t), flush=True)
torch.save(dict(out=out, sites=[(s.module, s.layer, s.d_in, s.d_out) for s in sites], npre=npre), "evaldata/gram2.pt")
