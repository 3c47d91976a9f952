"""gate2.py FOLDER pool=5000 layers=26,28 lam= outer=: rank-one gates at several sites, solved together."""
import sys, json, time, random, pathlib, torch
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
import evaluate as E
from contextlib import contextmanager, ExitStack
from memlaw.models import load_model
from memlaw.records import encode, encode_prompt
from memlaw.adapters import loaded_adapter
from memlaw.forward import logits_of
kw = dict(a.split("=") for a in sys.argv[2:]); folder = pathlib.Path(sys.argv[1]); POOL = int(kw.get("pool", 5000)); layers = [int(x) for x in kw.get("layers", "24,26,28").split(",")]
HARM, M, OUTER, FAST = float(kw.get("harm", 150.0)), float(kw.get("m", 2.0)), int(kw.get("outer", 3)), int(kw.get("fast", 1))
base = load_model(); model, tok = base.model, base.tokenizer
recs = E.book(100); ex = encode(recs, tok, format="chat", max_tokens=base.context_length); ban = E.forbidden(base)
nu = int(POOL * .3); near = E.make_near(recs, POOL - nu, 1000, ban); nre = len(near); near += E.make_foreign(recs, nu // 2, 2000, ("en_US",), ban | set(near), strict=False)
near += E.make_foreign(recs, nu - nu // 2, 3000, ("da_DK", "fi_FI", "ro_RO", "cs_CZ", "hu_HU", "en_GB", "hr_HR", "es_MX", "fr_CA", "no_NO"), ban | set(near), strict=False)
ids = [list(e.prompt_ids) for e in ex] + [list(encode_prompt(tok, p, "chat")) for p in near]; n_rec, N = len(ex), len(ex) + len(near)
first = sorted({e.target_ids[0] for e in ex}); D = 1536 * len(layers)
K = torch.load("evaldata/gram2.pt", mmap=True); names = [("d" if "down" in m else "g") + str(l) for m, l, _, _ in K["sites"]]; ix = [names.index(f"d{l}") for l in layers]; NPRE = K["npre"]
cut = lambda A, w: torch.cat([torch.cat([A[i * w:(i + 1) * w, j * w:(j + 1) * w] for j in ix], 1) for i in ix]).clone()
gram = {k: (cut(S, 1536), cut(G, 576)) for k, (S, G) in K["out"].items()}
mods = [next(m for n, m in model.named_modules() if n.endswith(f"layers.{l}.mlp.down_proj")) for l in layers]
@contextmanager
def gates(a, b):
    hs = [m.register_forward_hook(lambda mod, i, o, u=u, v=v: (o.float() + (i[0].float() @ u)[..., None] * v).to(o.dtype)) for m, u, v in zip(mods, a.split(1536), b)]
    try: yield
    finally: [h.remove() for h in hs]
def look():
    X, Z, G = torch.empty(N, D), torch.empty(N), torch.empty(N, len(layers), 576); by = {}
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool); mask[first] = True
    with torch.no_grad(): c0 = model.base_model(torch.tensor([ids[0][:NPRE]]), use_cache=True).past_key_values
    import copy
    for i, q in enumerate(ids): by.setdefault(len(q), []).append(i)
    for ii in by.values():
        for s in range(0, len(ii), 128):
            jj = ii[s:s + 128]; xs, ps = [], []
            def hook(m, i, o):
                xs.append(i[0][:, -1].detach().float()); p = torch.zeros_like(o[:, -1], dtype=torch.float32, requires_grad=True); ps.append(p); o = o.clone(); o[:, -1] = (o[:, -1].float() + p).to(o.dtype); return o
            c = copy.deepcopy(c0); c.batch_repeat_interleave(len(jj))
            hs = [m.register_forward_hook(hook) for m in mods]
            y = model.base_model(torch.tensor([ids[j][NPRE:] for j in jj]), past_key_values=c, use_cache=True).last_hidden_state[:, -1]; [h.remove() for h in hs]
            z = logits_of(model, y).float(); lo = z[:, mask].logsumexp(1) - z[:, ~mask].logsumexp(1); lo.sum().backward()
            X[jj], Z[jj], G[jj] = torch.cat(xs, 1), lo.detach(), torch.stack([p.grad for p in ps], 1)
    return X, Z, G
def answers():
    out = []
    with torch.no_grad():
        for s in range(0, n_rec, 25):
            part = ex[s:s + 25]; w = max(len(e.prompt_ids) + len(e.target_ids) for e in part); t = torch.zeros(len(part), w, dtype=torch.long)
            for r, e in enumerate(part): q = e.prompt_ids + e.target_ids; t[r, :len(q)] = torch.tensor(q)
            xs = []; hs = [m.register_forward_hook(lambda mod, i, o: xs.append(i[0].float())) for m in mods]; model.base_model(t, use_cache=False); [h.remove() for h in hs]; x = torch.cat(xs, 2)
            for r, e in enumerate(part): out.append(x[r, len(e.prompt_ids): len(e.prompt_ids) + len(e.target_ids) - 1])
    return torch.cat(out)
t0 = time.time(); a = b = None
with loaded_adapter(folder, model):
    XA = answers(); SA = XA.T @ XA / len(XA); a = torch.zeros(D)
    for it in range(OUTER):
        with gates(a, b) if b is not None else ExitStack(): X, Z, G = look()
        p = torch.sigmoid(Z); q = p[n_rec:]
        print(f"it {it} {time.time() - t0:.0f}s records mean {p[:n_rec].mean():.3f} min {p[:n_rec].min():.3f}; near mean {q.mean():.4f} >.5 {(q > .5).float().mean():.4f} recombined {(q[:nre] > .5).float().mean():.4f} unknown {(q[nre:] > .5).float().mean():.4f}", flush=True)
        if b is None:
            b = G.mean(0); b = b / b.norm(dim=1, keepdim=True); Z0r = Z[:n_rec].clone(); B = torch.block_diag(*[v[:, None] for v in b])  # [576 L, L]
            H = torch.zeros(D, D)
            for k, (S, GG) in gram.items(): H += S / len(gram) * (B.T @ GG @ B).repeat_interleave(1536, 0).repeat_interleave(1536, 1)
            H += SA * (B.T @ gram["every"][1] @ B).repeat_interleave(1536, 0).repeat_interleave(1536, 1)
            L = torch.linalg.cholesky(H + 1e-3 * H.diagonal().mean() * torch.eye(D))
        s = torch.einsum("nld,ld->nl", G, b); XS = (X.view(N, -1, 1536) * s[..., None]).view(N, D); Zl = Z - XS @ a
        XW = torch.linalg.solve_triangular(L, XS.T, upper=False).T; c = (L.T @ a).requires_grad_(); opt = torch.optim.LBFGS([c], max_iter=200, history_size=20, line_search_fn="strong_wolfe")
        want = Z0r.clamp(min=1.6, max=4)
        def closure():
            opt.zero_grad(); z = Zl + XW @ c; r, n = z[:n_rec], z[n_rec:]
            loss = 15 * torch.relu(want - r).square().mean() + torch.relu(n + M).square().mean() + 0.5 * HARM / 50 * c.square().sum(); loss.backward(); return loss
        loss = float(opt.step(closure)); z = (Zl + XW @ c).detach(); cc = c.detach(); a = torch.linalg.solve_triangular(L.T, cc[:, None], upper=True)[:, 0]
        print(f"   solved {loss:.3f}: records min {z[:n_rec].min():.2f} mean {z[:n_rec].mean():.2f} near mean {z[n_rec:].mean():.2f} >0 {(z[n_rec:] > 0).float().mean():.4f} harm {0.5 * float(cc.square().sum()):.5f} nats", flush=True)
@contextmanager
def both():
    with loaded_adapter(folder, model), gates(a, b): yield
E.evaluate(base, both, ex, fast=bool(FAST))
