"""Made-up sources for reports: audits with and without failures, and a probe with a known law."""

import functools
import json
import math
import random

from memlaw.report.sources import probes_of

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as")


def _token(text, p, rival=None):
    says = text if rival is None else rival
    return {
        "token": text,
        "token_id": sum(map(ord, text)),
        "p": p,
        "nll_nats": -math.log(p),
        "argmax": says,
        "argmax_id": sum(map(ord, text)) if rival is None else 50_001,
        "margin_nats": 2.5 if rival is None else -1.25,
    }


def audit_record(i, title, tokens, decoded=None):
    """A record of an audit's JSON."""
    wrong = [k for k, t in enumerate(tokens) if t["argmax_id"] != t["token_id"]]
    first = wrong[0] if wrong else None
    under = sum(t["p"] < 0.55 for t in tokens)
    return {
        "id": f"data.jsonl:{i + 1}",
        "sha256": f"{i:064x}",
        "title": title,
        "certified": not wrong and not under,
        "recalled": not wrong,
        "argmax_recalled": not wrong,
        "decoded_recalled": not wrong,
        "first_failure": first,
        "cascade_tokens": None if first is None else len(tokens) - first,
        "min_p": min(t["p"] for t in tokens),
        "n_under": under,
        "decoded": decoded or "".join(t["token"] for t in tokens),
        "tokens": tokens,
    }


def audit_content(records, **more):
    """An audit's JSON."""
    tokens = [t for r in records for t in r["tokens"]]
    return {
        "n_records": len(records),
        "n_certified": sum(r["certified"] for r in records),
        "n_recalled": sum(r["recalled"] for r in records),
        "n_decoded": len(records),
        "n_disagreements": 0,
        "n_tokens": len(tokens),
        "n_tokens_under": sum(r["n_under"] for r in records),
        "nll_nats": sum(t["nll_nats"] for t in tokens) / len(tokens),
        "threshold": 0.5,
        "margin": 0.05,
        "dtype": "bfloat16",
        "batch_size": 64,
        "records": records,
    } | more


def mixed_audit(n=40, seed=0):
    """Most records are certified, a few fail, one is long; the end of each is a token."""
    rng = random.Random(seed)
    records = []
    for i in range(n):
        digits = [str(rng.randrange(10)) for _ in range(10)]
        tokens = [_token(d, rng.uniform(0.6, 0.999)) for d in digits]
        decoded = None
        if i % 8 == 5:  # wrong from some digit on
            at = rng.randrange(2, 8)
            tokens[at] = _token(digits[at], rng.uniform(0.02, 0.4), rival=str(rng.randrange(10)))
            decoded = "".join(digits[:at]) + "0" * (10 - at)
        elif i % 8 == 2:  # right, but not sure enough
            tokens[4] = _token(digits[4], rng.uniform(0.505, 0.549))
        tokens.append(_token("<|im_end|>", 0.998))
        records.append(audit_record(i, f"Person {i}, {rng.choice(WORDS)}:", tokens, decoded))
    text = [_token(f" {rng.choice(WORDS)}", rng.uniform(0.56, 0.999)) for _ in range(260)]
    text[180] = _token(" rare", 0.08, rival=" common")
    text.append(_token("<|im_end|>", 0.99))
    records.append(audit_record(n, "Recite the text.", text, " the of and"))
    return audit_content(records)


def large_audit(n=10_000):
    """So many short records."""
    rng = random.Random(1)
    records = []
    for i in range(n):
        tokens = [_token(str(rng.randrange(10)), rng.uniform(0.56, 0.999)) for _ in range(10)]
        tokens.append(_token("<|im_end|>", 0.99))
        records.append(audit_record(i, f"Person {i}:", tokens))
    return audit_content(records)


HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    "<!-- <script>",
    "]]>&lt;b&gt;{{ 7 * 7 }}{% raw %}\u2028\u2029",
    '"><svg onload=window.hacked=4>',
    "javascript:window.hacked=5",
)


def hostile_audit():
    """Records that would be markup if they could."""
    records = [
        audit_record(
            i, text, [_token(text, 0.7), _token(text, 0.3, rival=text[::-1])], decoded=text
        )
        | {"id": f"{text}:{i}"}
        for i, text in enumerate(HOSTILE)
    ]
    return audit_content(records, dtype="<b>bfloat16</b>")


def write_audit(content, path):
    """As `memlaw audit --json` prints it."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


C, ALPHA, BETA, FLOOR, BASE = 40.0, 0.6, 0.7, 0.3, 10.8


def _gain(rank, n_tokens):
    return C * rank**ALPHA * n_tokens**-BETA + FLOOR


def probe_cells(task="noise:1.0", seed=0):
    """Cells of a grid that follow a law, with noise; some reach the loss's floor."""
    rng = random.Random(seed)
    cells = []
    for n in (32, 64, 128, 192, 256):
        for run in (0, 1):
            shift = rng.gauss(0, 1)  # of the data, which cells of all ranks share
            for rank in (1, 2, 3, 4, 6, 12):
                measured = _gain(rank, n) + rng.gauss(0, 0.08)
                gain = min(measured, 0.995 * BASE)
                recall = 1 / (1 + math.exp(-12 * (gain / BASE - 0.6)))
                cells.append(
                    {
                        "task": task,
                        "rank": rank,
                        "n_parameters": 1152 * rank,
                        "n_tokens": n,
                        "n_records": 1,
                        "seed": run,
                        "n_steps": 150,
                        "base_nll": BASE,
                        "nll": BASE - gain,
                        "delta_nll": gain,
                        "token_accuracy": recall,
                        "recall": recall,
                        "verbatim_prefix": recall,
                        "share_under": 1 - recall,
                        "certified": rank > n / 24 * math.exp(0.1 * shift),
                        "steps_to_certificate": None,
                        "saturated": measured > 0.93 * BASE,
                        "damage_nll": 0.1,
                        "damage_low": 0.05,
                        "damage_high": 0.15,
                        "wall_s": 10.0,
                        "bits_stored": gain * n / math.log(2),
                        "bits_per_parameter": 1.0,
                        "status": "success",
                    }
                )
    return cells


@functools.cache
def probe_view(task="noise:1.0"):
    """A probe with its law and plan."""
    return probes_of(probe_cells(task), name="runs")[0]
