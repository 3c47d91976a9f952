"""The page: views to one HTML file that needs nothing else.

Text from records reaches the page as data only: escaped JSON that the script shows by
`textContent`, or Jinja2's autoescape. A policy in the page's head forbids everything but the
scripts and styles whose hashes stand there; nothing can be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memlaw import __version__
from memlaw.report import figures, tables
from memlaw.report.sources import ProbeView, Recall, RunView

_MOST_TOKENS = 300_000  # shown one by one; more would make a file of many megabytes
_MOST_SNAPSHOT_BYTES = 2_000_000


def render(
    runs: Sequence[RunView], probes: Sequence[ProbeView], *, commands: Sequence[str] = ()
) -> str:
    """The page's HTML.

    Args:
        runs: write folders and audits.
        probes: tasks of probes.
        commands: what the report is made of, for the line that says how to make it again.
    """
    environment = Environment(
        loader=PackageLoader("memlaw.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = resources.files("memlaw.report")
    files = {name: (here / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    scripts = [_vega(), files["js"]]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_hash(files['css'])}; script-src {' '.join(map(_hash, scripts))}"
    )
    views = [*(run_page(v, f"run{i}") for i, v in enumerate(runs))]
    return environment.get_template("page.html.j2").render(
        title=_title(runs, probes),
        policy=policy,
        css=Markup(files["css"]),
        scripts=[Markup(script) for script in scripts],
        runs=views,
        probes=[probe_page(v, f"probe{i}") for i, v in enumerate(probes)],
        laws=tables.laws_table(probes),
        version=__version__,
        command=shlex.join(["memlaw", "report", *commands, "-o", "report.html"]),
    )


@functools.cache
def _vega() -> str:
    """The library that draws the figures, as a script without anything that would end its tag."""
    import vl_convert

    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def safe_json(content: Any) -> Markup:
    """JSON that may stand in a script element, whatever text is in it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _title(runs: Sequence[RunView], probes: Sequence[ProbeView]) -> str:
    names = [*(r.name for r in runs), *(p.name for p in probes)]
    return f"memlaw: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


# ---------------------------------------------------------------- a run


def run_page(view: RunView, key: str) -> dict[str, Any]:
    """What the template shows of a write folder or an audit."""
    drawn = {f.name: f for f in figures.run_figures(view)}
    return {
        "id": key,
        "name": view.name,
        "verdict": verdict(view),
        "tiles": _tiles(view),
        "recall": _shown(recall_data(view.recall)),
        "line": f"{view.recall.line:g}",
        "has_snapshots": view.recall.snapshots is not None,
        "figures": {name: _figure(f, key) for name, f in drawn.items()},
        "damage": tables.damage_table(view),
        "damage_text": _damage_text(view),
        "suffered": tables.suffered(view),
        "provenance": _provenance(view),
        "settings": _settings(view),
        "commands": _commands(view),
    }


def _shown(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"json": safe_json(content), "left_out": content["left_out"]}


def _figure(figure: figures.Figure, key: str) -> dict[str, Any]:
    return {
        "id": f"chart-{key}-{figure.name}",
        "title": figure.title,
        "caption": figure.caption,
        "json": safe_json(_narrow(figure.chart)),
        "columns": figure.columns,
    }


def _narrow(chart: Mapping[str, Any]) -> dict[str, Any]:
    """As wide as its place on the page, whose script chooses colours for light and dark."""
    config = {key: value for key, value in chart["config"].items() if key != "range"}
    return {
        **chart,
        "config": config,
        "width": "container",
        "autosize": {"type": "fit", "contains": "padding"},
    }


def verdict(view: RunView) -> dict[str, Any]:
    """What is guaranteed and what isn't, in words."""
    found, recall, certificate = tables.counts(view), view.recall, view.certificate
    n, dtype = found["records"], recall.dtype or "an unknown dtype"
    said = f"{found['recited']:,} of {n:,} records are recited word for word"
    if certificate is None:
        witness = "greedy decoding" if found["decoded"] == n else "one forward pass"
        return {
            "state": "good" if found["recited"] == n and not found["under"] else "bad",
            "word": "Recited" if found["recited"] == n else "Not all recited",
            "sentence": f"An audit found: {said}; {found['under']:,} of {found['tokens']:,} "
            f"tokens have p under {recall.line:g}.",
            "yes": [f"Measured in {dtype}, by {witness}, on the records below."],
            "no": [
                "There is no certificate here: nothing says which base model, adapter and "
                "records these figures belong to.",
                "Another dtype, device, prompt or decoding may give something else.",
            ],
        }
    harmless = (view.run or {}).get("harmless", True)
    good = bool(certificate["certified"])
    m = certificate["n_certified"]
    word = "Certified" if good else "Not certified"
    sentence = (
        f"All {n:,} records are recited word for word; no token has p under {recall.line:g}."
        if good
        else f"{m:,} of {n:,} records are certified; {n - m:,} "
        f"{'is' if n - m == 1 else 'are'} not. {said}."
    )
    if good and not harmless:
        sentence += " But it does more damage to other text than was allowed."
    whose = "each record" if good else f"each of the {m:,} certified records"
    damage = certificate["damage"]
    prompt = (
        "the tokenizer's chat template"
        if certificate["prompt_format"] == "chat"
        else "the bare text"
    )
    return {
        "state": "good" if good and harmless else "bad",
        "word": word if harmless or not good else "Certified, not harmless",
        "sentence": sentence,
        "yes": [
            f"In {certificate['dtype']}, every token of {whose}, the end of the answer "
            f"included, has p ≥ {recall.line:g} given the prompt and the tokens before it.",
            "Greedy decoding from the prompt alone gives exactly the record, and stops.",
            "It holds for the base model, tokenizer, adapter and records whose hashes are under "
            "Provenance, and anyone can measure it again.",
        ]
        if m
        else [],
        "no": [
            f"Another dtype than {certificate['dtype']}, or another kind of device than "
            f"{certificate['device']}: audit there before you rely on it.",
            f"Another prompt than the record's own, given by {prompt}; sampling instead of "
            "greedy decoding.",
            f"Other abilities: damage was measured on {damage['n_tokens']:,} tokens of one "
            "text, and on nothing else.",
        ],
    }


def _tiles(view: RunView) -> list[tuple[str, str, str]]:
    """Figures at the top: name, value, and a word on it."""
    found, recall = tables.counts(view), view.recall
    n = found["records"]
    tiles = [
        ("recited", f"{found['recited']:,} of {n:,}", "records, word for word"),
        (
            "under the line",
            f"{found['under']:,}",
            f"of {found['tokens']:,} tokens; lowest p {recall.p.min():.3f}",
        ),
    ]
    if damage := tables.damage_of(view):
        low, high = damage["delta_nll_ci95"]
        tiles.append(
            (
                "damage, ΔNLL",
                _signed(damage["delta_nll_nats"]),
                f"nats a token; 95 %: {_signed(low)} to {_signed(high)}",
            )
        )
    if run := view.run:
        adapter, results = run["adapter"], run["results"]
        tiles += [
            (
                "bits stored",
                f"{results['bits_stored']:,.0f}",
                f"{results['bits_per_parameter']:.3f} a parameter",
            ),
            ("adapter", f"rank {adapter['rank']}", f"{adapter['n_parameters']:,} parameters"),
            ("training", f"{run['epochs']:,} epochs", f"{run['timings']['wall_s']:,.0f} s in all"),
        ]
    return tiles


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def recall_data(recall: Recall) -> dict[str, Any]:
    """What the page's script draws records from; numbers as base64 of little-endian arrays."""
    starts = recall.starts
    shown = _shown_records(recall)
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in shown])
    texts: dict[str, int] = {}
    token = [texts.setdefault(recall.token[i], len(texts)) for i in rows.tolist()]
    wrong = [k for k, i in enumerate(rows.tolist()) if recall.wrong[i]]
    rivals = [texts.setdefault(recall.argmax[rows[k]], len(texts)) for k in wrong]
    content: dict[str, Any] = {
        "line": recall.line,
        "left_out": len(recall.records) - len(shown),
        "records": [
            [
                r.id,
                r.title,
                r.n_tokens,
                r.first_failure,
                r.cascade_tokens,
                r.decoded_recalled,
                None if r.decoded_recalled else r.decoded,
                r.argmax_recalled,
            ]
            for r in (recall.records[i] for i in shown)
        ],
        "texts": list(texts),
        "token": _array(token, "<u4"),
        "nll": _array(np.nan_to_num(recall.nll_nats[rows], nan=1e9, posinf=1e9), "<f4"),
        "margin": _array(np.nan_to_num(recall.margin_nats[rows], nan=0.0), "<f4"),
        "wrong": _array(wrong, "<u4"),
        "rivals": _array(rivals, "<u4"),
    }
    if kept := recall.snapshots:
        most = max(1, _MOST_SNAPSHOT_BYTES // len(rows))
        picked = np.unique(np.linspace(0, len(kept.epochs) - 1, min(most, len(kept.epochs))))
        chosen = [int(i) for i in picked]
        content["epochs"] = [kept.epochs[i] for i in chosen]
        seen = np.stack([kept.p[i][rows] for i in chosen]).astype(np.float32)
        content["seen"] = _array(np.clip(np.nan_to_num(seen) * 255, 0, 255), "u1")
    return content


def _shown_records(recall: Recall) -> list[int]:
    """All records; where that is too much, those with the least probable tokens, in order."""
    if len(recall.token) <= _MOST_TOKENS:
        return list(range(len(recall.records)))
    low = np.minimum.reduceat(recall.p, recall.starts[:-1])
    room = _MOST_TOKENS
    found: list[int] = []
    for i in np.argsort(low, kind="stable").tolist():
        if found and recall.records[i].n_tokens > room:
            break
        found.append(i)
        room -= recall.records[i].n_tokens
    return sorted(found)


def _array(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def _damage_text(view: RunView) -> str:
    damage = tables.damage_of(view)
    if damage is None:
        return ""
    return (
        f"Measured on {damage['n_tokens']:,} tokens in {damage['n_windows']} pieces of text that "
        f"training didn't see ({damage['text']}); the base model's own loss there is "
        f"{damage['base_nll_nats']:.3f} nats a token. ΔNLL is how much worse the adapted model "
        "predicts that text, KL how far its predictions have moved."
    )


def _provenance(view: RunView) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    certificate, run = view.certificate or {}, view.run or {}
    for key, said in (
        ("created", "certified on"),
        ("base_model", "base model"),
        ("base_sha256", "base model's hash"),
        ("tokenizer_sha256", "tokenizer's hash"),
        ("adapter_sha256", "adapter's hash"),
        ("records_sha256", "records' hash"),
        ("dtype", "dtype"),
        ("device", "device"),
        ("batch_size", "records a forward pass"),
        ("prompt_format", "prompt format"),
    ):
        if key in certificate:
            value = certificate[key]
            if key == "base_model":  # a folder on somebody's machine says little elsewhere
                value = run.get("base", {}).get("spec", value)
                value = value if value != "embedded" else "embedded (SmolLM2-135M-Instruct)"
            rows.append((said, str(value)))
    rows += [(name, str(v)) for name, v in certificate.get("versions", {}).items()]
    machine = run.get("machine", {})
    if "platform" in machine:
        rows.append(("machine", f"{machine['platform']}, {machine.get('n_threads')} threads"))
    return rows


def _settings(view: RunView) -> list[tuple[str, str]]:
    config = (view.run or {}).get("config", {})
    return [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in config.items()]


def _commands(view: RunView) -> list[tuple[str, str]]:
    if view.certificate is None:
        return []
    return [
        (
            "Measure it again",
            shlex.join(["memlaw", "audit"])
            + " RECORDS --certificate "
            + shlex.quote(f"{view.name}/certificate.json"),
        ),
        ("Let it recite", f"memlaw ask {shlex.quote(view.name)} PROMPT"),
    ] + ([("Make it again", f"memlaw write RECORDS -o FOLDER{_flags(view)}")] if view.run else [])


def _flags(view: RunView) -> str:
    """Settings that aren't the defaults, as far as those are known without torch."""
    config = (view.run or {})["config"]
    flags = [
        f"--{key.replace('_', '-')} {shlex.quote(str(config[key]))}"
        for key, usual in (
            ("model", "embedded"),
            ("rank", "auto"),
            ("placement", "down_proj"),
            ("layers", "auto"),
            ("objective", "triage"),
            ("learning_rate", 1e-2),
            ("max_damage", None),
            ("dtype", "auto"),
            ("seed", 0),
        )
        if config.get(key, usual) != usual
    ]
    return "".join(f" {flag}" for flag in flags)


# ---------------------------------------------------------------- a probe


def probe_page(view: ProbeView, key: str) -> dict[str, Any]:
    """What the template shows of a probe's task."""
    law, plan = view.law, view.plan
    censored = sum(bool(cell.get("saturated")) for cell in view.cells)
    return {
        "id": key,
        "name": view.name,
        "n_cells": len(view.cells),
        "n_censored": censored,
        "figures": [_figure(f, key) for f in figures.probe_figures(view)],
        "tables": tables.probe_tables(view),
        "law": law,
        "r2": None if law is None or law.r2 is None else f"{law.r2:.4f}",
        "plan": plan,
        "plan_json": None
        if plan is None
        else safe_json(
            {
                "logTokens": plan.log_tokens,
                "z": plan.z,
                "logRank": plan.log_rank,
                "parametersPerRank": plan.parameters_per_rank,
                "tokens": plan.tokens,
                "ranks": plan.ranks,
                "bytesPerParameter": plan.bytes_per_parameter,
            }
        ),
    }
