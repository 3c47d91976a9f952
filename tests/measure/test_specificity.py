"""What else an adapter changes: other prompts, near misses, prose and chats; and the verdict."""

import contextlib
import dataclasses
import json
import re

import pytest

import memlaw
from memlaw.certify.certificate import read_certificate
from memlaw.cli import run
from memlaw.data.record import Record
from memlaw.data.texts import general_texts
from memlaw.measure.answers import Answered
from memlaw.measure.damage import Damage
from memlaw.measure.domains import ChatsDamage, ProseDamage
from memlaw.measure.harm import KINDS
from memlaw.measure.leaks import KindCounts, Leaks
from memlaw.measure.specificity import specificity
from memlaw.measure.subject import Subject
from memlaw.measure.unchanged import Unchanged
from memlaw.model.base import load_model

NEW = ("prose", "chats", "elsewhere", "near_misses")
SETTINGS = {"objective": "sft", "retention": 0.0, "max_epochs": 300}


def _subject(folder, pairs, **more):
    base = load_model(folder, dtype="float32")
    return Subject(
        base=base,
        texts=general_texts(),
        records=[Record(prompt=p, completion=c, id=p) for p, c in pairs],
        format="chat" if base.tokenizer.chat_template else "plain",
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # with a chat template, and without
def test_what_changes_nothing_is_found_to_change_nothing(make_model, phone_book, architecture):
    subject = _subject(make_model(architecture), phone_book)
    bare = subject.base.model
    found = {
        name: KINDS[name].of_run(subject).measure(bare, lambda: contextlib.nullcontext(bare))
        for name in NEW
    }
    for name in ("prose", "chats"):
        assert found[name].delta_nll_nats == pytest.approx(0, abs=1e-6)
        assert found[name].n_windows >= 32
    elsewhere, near = found["elsewhere"], found["near_misses"]
    assert elsewhere.unchanged == elsewhere.floor == elsewhere.n
    assert elsewhere.n == elsewhere.n_everyday + 200
    assert elsewhere.share_of_floor == 1
    assert elsewhere.kl_worst_nats == pytest.approx(0, abs=1e-6)
    assert elsewhere.changed == ()
    assert elsewhere.overturned == 0
    assert sum(counts.n for counts in near.by_kind.values()) == 200
    assert near.n == near.unchanged >= 160
    assert near.leaks == near.made_up == 0
    assert near.answered == ()
    assert specificity(found).specific


@pytest.fixture(scope="module")
def leaky(llama, phone_book, tmp_path_factory):
    """A certified folder of an adapter that nothing held back, and its result."""
    out = tmp_path_factory.mktemp("leaky") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memlaw.WriteConfig, "holds", False)  # measured, but not trained for
        result = memlaw.write(phone_book, out, model=str(llama), **SETTINGS)
    assert result.certified
    return out, result


@pytest.mark.slow
def test_an_adapter_that_leaks_is_found(leaky, phone_book):
    out, result = leaky
    stored = {completion for _, completion in phone_book}
    elsewhere, near = result.harms["elsewhere"], result.harms["near_misses"]
    assert near.leaks > 0
    leaks = [a for a in near.answered if a.kind == "recombined: a stored answer"]
    assert leaks
    assert all(any(number in a.after for number in stored) for a in leaks)
    assert not {a.prompt for a in near.answered} & {prompt for prompt, _ in phone_book}
    assert elsewhere.share_of_floor < 0.5
    assert elsewhere.kl_nats > 0.1
    assert elsewhere.changed[0].before != elsewhere.changed[0].after
    verdict = result.specificity
    assert not verdict.specific
    assert f"{near.leaks} of {near.n} near misses leak a stored answer" in verdict.reasons
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "**NOT SPECIFIC.**" in card
    assert "ΔNLL" in json.dumps(verdict.reasons, ensure_ascii=False)


@pytest.mark.slow
def test_it_is_what_decoding_one_by_one_says(leaky, llama):
    out, result = leaky
    for answer in result.harms["near_misses"].answered[:3]:
        said = memlaw.ask(out, answer.prompt, model=str(llama), max_tokens=12).text
        assert said.strip() == answer.after


@pytest.mark.slow
def test_the_certificate_says_it_and_a_new_measurement_bears_it_out(leaky, phone_book):
    out, result = leaky
    certificate = read_certificate(out / "certificate.json")
    assert set(certificate.harms) == set(NEW)
    assert certificate.specific is False
    assert list(certificate.not_specific_because) == list(result.specificity.reasons)
    check = memlaw.check_certificate(out / "certificate.json", phone_book)
    assert check.holds, check.mismatches
    assert check.harms["elsewhere"] == result.harms["elsewhere"]
    elsewhere = result.harms["elsewhere"]
    assert 0 < elsewhere.overturned <= elsewhere.n - elsewhere.unchanged
    assert check.harms["near_misses"] == result.harms["near_misses"]


def _forge(name, claim):
    if name == "elsewhere":
        harmless = dataclasses.replace(
            Unchanged.from_json(claim),
            unchanged=claim["n"],
            everyday_unchanged=claim["n_everyday"],
            floor=claim["n"],
            everyday_in_form=0,
            kl_nats=0.0,
            kl_ci95=(0.0, 0.0),
            overturned=0,
        )
    elif name == "near_misses":
        harmless = dataclasses.replace(
            Leaks.from_json(claim),
            by_kind={
                kind: KindCounts(n=counts["n"], leaks=0, made_up=0, unchanged=counts["n"])
                for kind, counts in claim["by_kind"].items()
            },
        )
    else:
        kind = {"prose": ProseDamage, "chats": ChatsDamage}[name]
        harmless = dataclasses.replace(
            kind.from_json(claim), delta_nll_nats=0.0, delta_nll_ci95=(-0.001, 0.001)
        )
    return harmless.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_forged_claim_is_found(leaky, phone_book, name):
    out, _ = leaky
    path = out / "forged.json"
    content = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    content["harms"][name] = _forge(name, content["harms"][name])
    claims = {"damage": content["damage"], **content["harms"]}
    verdict = specificity({kind: KINDS[kind].read(claim) for kind, claim in claims.items()})
    if list(verdict.reasons) != content["not_specific_because"]:
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(memlaw.MemlawError, match="verdict on specificity is not that of its"):
            memlaw.check_certificate(path, phone_book)
        content["not_specific_because"] = list(verdict.reasons)
    path.write_text(json.dumps(content), encoding="utf-8")
    check = memlaw.check_certificate(path, phone_book)
    assert not check.holds
    assert len(check.mismatches) == 1
    path.unlink()


@pytest.mark.slow
def test_without_specificity_the_certificate_is_the_old_one(llama, phone_book, tmp_path):
    settings = SETTINGS | {"max_epochs": 2, "specificity": False}
    result = memlaw.write(phone_book, tmp_path / "out", model=str(llama), **settings)
    assert set(result.harms) == {"damage"}
    assert result.specificity is None
    content = json.loads((tmp_path / "out" / "certificate.json").read_text(encoding="utf-8"))
    assert not {"harms", "specific", "not_specific_because"} & content.keys()


@pytest.mark.slow
def test_the_command_line_says_it(leaky, phone_file, llama, tmp_path, capsys):
    out, _ = leaky
    near = tmp_path / "near.txt"
    near.write_text("Jerry Oyelaran:\nWho knows Jerry?\n", encoding="utf-8")
    args = ["audit", phone_file, "--adapter", out, "--specificity", "--near", near]
    assert run([str(a) for a in args]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "NOT SPECIFIC" in said
    assert "unchanged elsewhere" in said
    assert "near misses" in said
    assert run([*map(str, args), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["specific"] is False
    assert content["not_specific_because"]
    assert content["harms"]["near_misses"]["by_kind"]["given"]["n"] == 2
    assert set(content["harms"]) == {"damage", *NEW}


@pytest.mark.slow
@pytest.mark.usefixtures("little_is_held")
def test_a_bound_that_is_missed_is_said(llama, phone_file, tmp_path, capsys):
    settings = {"objective": "sft", "max-epochs": 110, "retention": 3.0, "min-specificity": 0.9}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    args = ["write", phone_file, "-o", tmp_path / "out", "--model", llama, *flags]
    assert run([str(a) for a in args]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "CERTIFIED NOT SPECIFIC" in said
    missed = r"BUT NOT HARMLESS: only 0\.\d% of other prompts may be answered as before"
    assert re.search(missed, said)
    assert "against --min-specificity 0.9" in said


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_a_bound_out_of_range_is_refused(value):
    with pytest.raises(memlaw.MemlawError, match="min_specificity"):
        memlaw.WriteConfig(min_specificity=value)
    with pytest.raises(memlaw.MemlawError, match="min_specificity needs specificity"):
        memlaw.WriteConfig(min_specificity=0.5, specificity=False)


# ---------------------------------------------------------------- the verdict, on given figures


def _harms(**changed):
    counts = {"n": 100, "leaks": 0, "made_up": 5, "unchanged": 90}
    figures = {
        "unchanged": 60,
        "floor": 100,
        "everyday_in_form": 0,
        "kl_nats": 0.05,
        "delta": 0.01,
        "leaks": 0,
        "made_up": 5,
    } | changed
    damage = {
        "delta_nll_ci95": (0.0, 0.1),
        "kl_nats": 0.0,
        "kl_ci95": (0.0, 0.0),
        "base_nll_nats": 3.0,
        "n_windows": 2,
        "n_tokens": 10,
        "text": "a text",
        "text_sha256": "",
    }
    return {
        "damage": Damage(delta_nll_nats=-0.1, **damage),
        "prose": ProseDamage(delta_nll_nats=figures["delta"], **damage),
        "elsewhere": Unchanged(
            n=110,
            n_everyday=50,
            unchanged=figures["unchanged"],
            everyday_unchanged=20,
            floor=figures["floor"],
            everyday_in_form=figures["everyday_in_form"],
            kl_nats=figures["kl_nats"],
            kl_ci95=(0.0, 1.0),
            kl_worst_nats=3.0,
            prompts_sha256="",
        ),
        "near_misses": Leaks(
            by_kind={
                "unknown": KindCounts(
                    **counts | {"leaks": figures["leaks"], "made_up": figures["made_up"]}
                ),
                "misspelt": KindCounts(n=100, leaks=100, made_up=100, unchanged=0),
            },
            prompts_sha256="",
        ),
    }


def test_what_is_said_of_overturned_answers():
    found = dataclasses.replace(_harms()["elsewhere"], overturned=7)
    assert "7 overturned" in found.row()[1]
    assert "7 of the answers that changed were *overturned*" in found.paragraph()
    assert Unchanged.from_json(found.to_json()) == found
    older = {name: value for name, value in found.to_json().items() if name != "overturned"}
    assert "overturned" not in Unchanged.from_json(older).row()[1]
    assert found.mismatch(dataclasses.replace(found, overturned=10)) is None
    assert found.mismatch(dataclasses.replace(found, overturned=None)) is None
    for forged in (0, 30):
        said = found.mismatch(dataclasses.replace(found, overturned=forged))
        assert said == f"7 answers are overturned, not {forged}"
    with pytest.raises(ValueError, match="51 overturned, 60 of 110 unchanged"):
        Unchanged.from_json({**found.to_json(), "overturned": 51})


def test_at_the_limits_it_is_specific():
    assert specificity(_harms()).specific  # a misspelt prompt may mean the record


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("unchanged", 59, "59% of other prompts"),
        ("everyday_in_form", 1, "1 of 50 everyday questions"),
        ("kl_nats", 0.051, "KL on other prompts is 0.051"),
        ("delta", 0.011, "ΔNLL on prose is +0.011"),
        ("leaks", 1, "1 of 100 near misses leak"),
        ("made_up", 6, "6 of 100 near misses get an answer made up"),
        ("kl_nats", float("nan"), "KL on other prompts is nan"),
    ],
)
def test_each_figure_past_its_limit_is_named(figure, value, said):
    verdict = specificity(_harms(**{figure: value}))
    assert not verdict.specific
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith(said)


def test_where_other_prompts_were_not_asked_there_is_no_verdict():
    assert specificity({"damage": _harms()["damage"]}) is None


@pytest.mark.parametrize("kind", ["elsewhere", "near_misses"])
def test_figures_that_contradict_each_other_are_refused(kind):
    harm = _harms()[kind]
    content = json.loads(json.dumps(harm.to_json()))
    assert KINDS[kind].read(content) == harm
    derived = {"elsewhere": ("share_of_floor", 0.99), "near_misses": ("made_up", 0)}[kind]
    with pytest.raises(ValueError, match=f"{derived[0]} is"):
        KINDS[kind].read({**content, derived[0]: derived[1]})


def test_what_is_shown_does_not_make_two_measurements_differ():
    harm = _harms()["near_misses"]
    shown = Answered(prompt="Ann", before="?", after="123", kind="unknown: made up")
    assert dataclasses.replace(harm, answered=(shown,)) == harm
