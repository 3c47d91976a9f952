"""What the page shows of a write folder or an audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memlaw.core.criterion import of_thousand
from memlaw.report import embed, tables
from memlaw.report.changes import (
    KNOWN,
    changes_tables,
    changes_text,
    damage_by_domain,
    generality_tables,
)
from memlaw.report.generations import generations_tables, generations_text
from memlaw.report.recall_data import recall_data
from memlaw.report.reproduce import commands
from memlaw.report.run_charts import run_figures
from memlaw.report.run_view import (
    RunView,
    config_of,
    damage_of,
    other_harms,
    specificity_of,
)
from memlaw.report.tables import signed


def run_page(view: RunView, key: str) -> dict[str, Any]:
    """What the template shows of a write folder or an audit.

    Args:
        view: the run or audit.
        key: the ids of its elements on the page start with it.
    """
    records = recall_data(view)
    return {
        "id": key,
        "name": view.name,
        "verdict": verdict(view),
        "tiles": _tiles(view),
        "recall": {"json": embed.safe_json(records), "left_out": records["left_out"]},
        "line": f"{view.recall.criterion.line:g}",
        "has_snapshots": view.snapshots is not None,
        "figures": {f.name: embed.figure(f, key) for f in run_figures(view)},
        "damage": tables.damage_table(view),
        "damage_text": _damage_text(view),
        "suffered": tables.suffered(view),
        "changes": changes_tables(view),
        "generality": generality_tables(view),
        "generations": generations_tables(view),
        "generations_text": generations_text(view),
        "changes_text": changes_text(view) if changes_tables(view) else "",
        "harms": [
            tables.harm_table(name, harm)
            for name, harm in other_harms(view).items()
            if name not in KNOWN
        ],
        "provenance": _provenance(view),
        "settings": _settings(view),
        "commands": commands(view),
    }


def _other_answers(view: RunView) -> str:
    """A sentence on how many other prompts are answered as before; empty: it isn't on record."""
    if (found := other_harms(view).get("elsewhere")) is None:
        return ""
    return (
        f" Asked {found['n']:,} other things, it gives {found['unchanged']:,} answers as before, "
        f"{found['share_of_floor']:.0%} of the {found['floor']:,} that rounding alone leaves."
    )


def verdict(view: RunView) -> dict[str, Any]:
    """What is guaranteed and what isn't, in words.

    Returns:
        `state` (`good` or `bad`), `word` and `sentence` for the head of the page, and the lists of
        sentences `yes` (what is guaranteed or was measured) and `no` (what is not guaranteed).
    """
    recall, certificate = view.recall, view.certificate
    n, dtype = len(recall.records), recall.dtype or "an unknown dtype"
    line, under = f"{recall.criterion.line:g}", recall.n_under
    said = f"{recall.n_recalled:,} of {n:,} records are recited word for word"
    if recall.prefix_tokens is not None:
        share, low, high = recall.share_recalled
        said = (
            f"{recall.n_recalled:,} of {n:,} documents are extracted, continued word for word from "
            f"their first {recall.prefix_tokens} tokens: {share:.1%} (95 %: {low:.1%} to "
            f"{high:.1%})"
        )
    if certificate is None:
        witness = "greedy decoding" if recall.n_decoded == n else "one forward pass"
        return {
            "state": "good" if recall.n_recalled == n and not (under and recall.end) else "bad",
            "word": "Recited" if recall.n_recalled == n else "Not all recited",
            "sentence": f"An audit found: {said}; {under:,} of {len(recall.tokens):,} "
            f"tokens have p under {line}.",
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
        f"All {n:,} records are recited word for word; no token has p under {line}."
        if good
        else f"{m:,} of {n:,} records are certified; {n - m:,} "
        f"{'is' if n - m == 1 else 'are'} not. {said}."
    )
    if good and not harmless:
        sentence += " But it does more damage to other text than was allowed."
    specificity = specificity_of(view)
    specific, reasons = specificity or (True, [])
    if specificity is not None:
        sentence += _other_answers(view)
        if not specific:
            sentence += " It is not specific: see below what speaks against it."
    if good:
        missed = [
            word
            for word, held in (("not harmless", harmless), ("not specific", specific))
            if not held
        ]
        word = ", ".join([word, *missed] if missed or not specificity else [word, "specific"])
    whose = "each record" if good else f"each of the {m:,} certified records"
    damage = certificate["damage"]
    prompt = (
        "the tokenizer's chat template"
        if certificate["prompt_format"] == "chat"
        else "the bare text"
    )
    return {
        "state": "good" if good and harmless and specific else "bad",
        "word": word,
        "sentence": sentence,
        "yes": [
            f"In {certificate['dtype']}, every token of {whose}, the end of the answer "
            f"included, has p ≥ {line} given the prompt and the tokens before it.",
            "Greedy decoding from the prompt alone gives exactly the record, and stops.",
            "It holds for the base model, tokenizer, adapter and records whose hashes are under "
            "Provenance, and anyone can measure it again.",
        ]
        if m
        else [],
        "no": [
            *(f"{reason[0].upper()}{reason[1:]}." for reason in reasons),
            f"Another dtype than {certificate['dtype']}, or another kind of device than "
            f"{certificate['device']}: audit there before you rely on it.",
            *_in_other_batches(certificate),
            f"Another prompt than the record's own, given by {prompt}; sampling instead of "
            "greedy decoding.",
            "Other abilities than those under “What else changed”, where they were measured."
            if specificity
            else f"Other abilities: damage was measured on {damage['n_tokens']:,} tokens of one "
            "text, and on nothing else.",
        ],
    }


def _in_other_batches(certificate: Mapping[str, Any]) -> list[str]:
    """What is expected of other batches; nothing where that isn't on record."""
    if (rounding := certificate.get("rounding")) is None:
        return []
    return [
        "Each single answer in other batches, which are rounded otherwise: of 1,000 that are right "
        f"here {of_thousand(rounding['flips_per_1000'])} are expected to be others there."
    ]


def _tiles(view: RunView) -> list[tuple[str, str, str]]:
    """Figures at the top: name, value, and a word on it."""
    recall = view.recall
    n = len(recall.records)
    tiles = [
        ("recited", f"{recall.n_recalled:,} of {n:,}", "records, word for word"),
        (
            "under the line",
            f"{recall.n_under:,}",
            f"of {len(recall.tokens):,} tokens; lowest p {recall.tokens.p.min():.3f}",
        ),
    ]
    if domains := damage_by_domain(view):
        where, damage = next(iter(domains.items()))
        low, high = damage["delta_nll_ci95"]
        tiles.append(
            (
                "damage, ΔNLL",
                signed(damage["delta_nll_nats"], 3),
                f"nats a token{f' on {where}' if len(domains) > 1 else ''}; 95 %: "
                f"{signed(low, 3)} to {signed(high, 3)}",
            )
        )
    if elsewhere := other_harms(view).get("elsewhere"):
        low, high = elsewhere["share_of_floor_ci95"]
        tiles.append(
            (
                "other prompts",
                f"{elsewhere['share_of_floor']:.0%}",
                f"answered as before, of what rounding leaves; 95 %: {low:.0%} to {high:.0%}",
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


def _damage_text(view: RunView) -> str:
    damage = damage_of(view)
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
    return [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in config_of(view).items()]
