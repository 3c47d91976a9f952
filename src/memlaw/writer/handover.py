"""The end of a run of `write`: everything into its folder, the certificate last."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import make_certificate
from memlaw.core.commitment import kept_key
from memlaw.core.files import (
    ANSWERS_FILE,
    CERTIFICATE_FILE,
    RUN_FILE,
    TOKENS_FILE,
    made,
    write_json,
    write_text,
    writing,
)
from memlaw.core.first_time import Stopwatch
from memlaw.measure.decode import decoded_text
from memlaw.model.formats import adapter_sha256, save_adapter
from memlaw.model.provenance import machine, versions
from memlaw.train.snapshots import SNAPSHOTS_FILE
from memlaw.train.speed import measure_speed
from memlaw.writer.card import model_card
from memlaw.writer.folder import CARD_FILE, CHECKPOINT_FILE
from memlaw.writer.goals import Found
from memlaw.writer.private import write_private
from memlaw.writer.records import write_skipped
from memlaw.writer.result import WriteResult
from memlaw.writer.state import Run


def hand_over(run: Run, found: Found, stopped_because: str, watch: Stopwatch) -> WriteResult:
    """Write everything; the certificate last, so that it vouches for what is there.

    Until then there is a checkpoint of the trained weights, with which `resume` ends in the same.

    Args:
        run: the run, its training over.
        found: what its adapter was measured to be.
        stopped_because: why training ended.
        watch: runs since the run was begun.
    """
    out, base, adapter = run.out, run.base, run.learner.adapter
    made(out)
    run.save(run.learner.state(), ended=stopped_because if found.meets(run.bounds()) else "")
    _remove(out / CERTIFICATE_FILE)  # of a run that went on: it vouches for other weights
    save_adapter(adapter, out, base_path=base.name, base_sha256=base.sha256)
    if run.config.tokenizer is not None:
        with writing(out):
            base.tokenizer.save_pretrained(out)
    certificate = make_certificate(
        found.audit,
        found.harms,
        key=kept_key(out),
        device=base.model.device.type,
        prompt_format=run.prompt_format,
        base_model=base.name,
        base_sha256=base.sha256,
        tokenizer_sha256=base.tokenizer_sha256,
        tokenizer=run.config.tokenizer,
        adapter_sha256=adapter_sha256(out),
        n_parameters=adapter.n_parameters,
        versions=versions(),
        activated=run.config.activated,
        invocation_ids=run.invocation_ids,
        rendering=run.settled.to_json(),
        end=(end := run.examples[0].target_ids[-1], decoded_text(base.tokenizer, [end])),
    )
    result = WriteResult(
        out=out,
        certificate=certificate,
        audit=found.audit,
        harms=found.harms,
        bounds=run.bounds(),
        forms=found.forms,
        rank=adapter.rank,
        n_parameters=adapter.n_parameters,
        bits_stored=float(run.base_nll.sum()) / math.log(2) - found.audit.total_nll_bits,
        epochs=run.learner.epoch,
        n_left_out=run.curve[-1].n_left_out if run.curve else 0,
        wall_s=watch.wall_s,
        once_s=watch.once_s,
        speed=measure_speed(run.curve, base.model.dtype, base.model.device),
        stopped_because=stopped_because,
    )
    found.audit.write_tokens(out / TOKENS_FILE)
    run.snapshots.until(run.learner.epoch).write(out / SNAPSHOTS_FILE)
    if answers := _answers_json(run, result):
        write_json(out / ANSWERS_FILE, answers)
    else:
        _remove(out / ANSWERS_FILE)
    write_json(out / RUN_FILE, _run_json(run, result))
    records = [example.record for example in run.examples]
    write_private(out, records, run.learner.solver.memory(), run.held)
    write_skipped(out, run.bad)
    sites = [site.module for site in run.sites]
    card = model_card(
        result,
        base_spec=base.spec,
        is_peft=adapter.is_peft,
        sites=sites,
        loader=base.loader,
    )
    write_text(out / CARD_FILE, card)
    write_json(out / CERTIFICATE_FILE, certificate.to_json())
    if result.succeeded:  # if not, more epochs may still do it
        _remove(out / CHECKPOINT_FILE)
    return result


def _remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def _run_json(run: Run, result: WriteResult) -> dict[str, Any]:
    """What `run.json` says."""
    certificate, base = result.certificate, run.base
    return {
        "format": 1,
        "status": "certified" if result.certified else "not certified",
        "harmless": result.harmless,
        "specific": certificate.specific,
        "not_specific_because": list(certificate.not_specific_because),
        "stopped_because": result.stopped_because,
        "config": run.config.recorded(),
        "base": {
            "spec": base.spec,
            "path": base.path,
            "source": base.source,
            "sha256": base.sha256,
        },
        "tokenizer_sha256": base.tokenizer_sha256,
        "prompt_format": run.prompt_format,
        "rendering": run.settled.to_json(),
        "dtype": base.dtype,
        "device": certificate.device,
        "records": {
            "n": certificate.n_records,
            "n_skipped": len(run.bad),
            "sha256": certificate.records_sha256,
            "n_target_tokens": len(result.audit.tokens.token_id),
        },
        "adapter": {
            "rank": result.rank,
            "n_parameters": result.n_parameters,
            "sha256": certificate.adapter_sha256,
            "sites": [asdict(site) for site in run.sites],
        },
        "results": {
            "n_certified": result.audit.n_certified,
            "n_recalled": result.audit.n_recalled,
            "base_nll_nats": float(run.base_nll.mean()),
            "nll_nats": result.audit.nll_nats,
            "bits_stored": result.bits_stored,
            "bits_per_parameter": result.bits_per_parameter,
            **_harms_json(run, result),
            **_forms_json(result),
        },
        "timings": {
            "wall_s": result.wall_s,
            "training_s": sum(e.wall_s for e in run.curve),
            "trained_before_s": run.trained_before_s,
            "given_up_s": run.given_up_s,
            "once_s": result.once_s,
            "audit_s": run.audit_s,
            "forgetting_s": run.forgetting_s,
            "speed": asdict(result.speed) if result.speed else None,
        },
        "epochs": result.epochs,
        "curve": [asdict(stats) for stats in run.curve],
        "versions": certificate.versions,
        "machine": machine(),
        "generations": [*run.earlier, _generation(run, result)],
    }


def _generation(run: Run, result: WriteResult) -> dict[str, Any]:
    """The line of `generations` in `run.json` that this run is."""
    damage = result.damage
    return {
        "number": len(run.earlier) + 1,
        "created": result.certificate.created,
        "records": result.certificate.n_records,
        **run.changed,
        "n_certified": result.audit.n_certified,
        "rank": result.rank,
        "epochs": result.epochs,
        "anew": run.anew,
        "flop": sum(stats.flop for stats in run.curve),
        "damage_nats": damage.delta_nll_nats,
        "damage_ci95": list(damage.delta_nll_ci95),
        "specific": result.certificate.specific,
        "wall_s": result.wall_s,
        "training_s": sum(stats.wall_s for stats in run.curve),
        "given_up_s": run.given_up_s,
        "once_s": result.once_s,
        "adapter_sha256": result.certificate.adapter_sha256,
        **({"forgotten": run.forgotten} if run.forgotten else {}),
    }


def _harms_json(run: Run, result: WriteResult) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, harm in result.harms.items():
        found[name] = harm.to_json()
        found |= run.measurements[name].details(harm, run.base.tokenizer)
    return found


def _forms_json(result: WriteResult) -> dict[str, Any]:
    """What was found in the forms that were asked for; empty where none were."""
    forms = {
        name: {
            "n_certified": audit.n_certified,
            "n_recalled": audit.n_recalled,
            "lowest_p": min(r.min_p for r in audit.records),
        }
        for name, audit in result.forms.items()
    }
    return {"forms": forms} if forms else {}


def _answers_json(run: Run, result: WriteResult) -> dict[str, Any]:
    """What `answers.json` says: of each kind of harm the prompts that are answered otherwise."""
    found = {name: run.measurements[name].answers(harm) for name, harm in result.harms.items()}
    return {name: [asdict(one) for one in answers] for name, answers in found.items() if answers}
