"""The survival table: an adapter in every form in which people run it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import ConfigError
from memlaw.export.forms import Bench
from memlaw.export.merged import with_weights
from memlaw.export.survive import survival
from memlaw.measure.examine import audit_examples
from memlaw.model.base import load_model
from memlaw.model.forward import collate, target_logits
from memlaw.model.quantised import load_quantised
from memlaw.settings.forms import FORMS

pytestmark = pytest.mark.slow
HAS_QUANT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def folder(llama, phone_book, tmp_path_factory):
    out = tmp_path_factory.mktemp("survival") / "out"
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified
    return out


@pytest.fixture(scope="module")
def found(folder, phone_book):
    forms = [name for name in FORMS if not name.startswith("base-")]
    return survival(phone_book, adapter=folder, forms=forms)


def _p(found, name):
    row = next(row for row in found.rows if row.form.name == name)
    return torch.from_numpy(row.audit.tokens.p)


def test_every_form_is_tried_and_computed_as_its_name_says(found):
    told = {row["name"]: row for row in found.to_json()["rows"]}
    assert list(told) == ["peft", *(name for name in FORMS if not name.startswith("base-"))]
    assert all(row["tried"] for row in told.values())
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for short, dtype in dtypes.items():
        assert told[f"peft-{short}"]["dtype"] == told[f"merged-{short}"]["dtype"] == dtype
    assert [told[f"batch-{n}"]["batch_size"] for n in (1, 8, 64)] == [1, 8, 64]
    assert told["peft"]["n_certified"] == told["peft"]["n_recited"] == 4


def test_what_only_rounds_otherwise_in_float32_is_the_plain_audit(found):
    same = ["batch-1", "no-cache", "pad-left", "attn-eager", "attn-sdpa", "peft-fp32"]
    for name in [*same, "merged-fp32"]:
        torch.testing.assert_close(_p(found, name), _p(found, "peft"), atol=2e-4, rtol=0)
    for name in ("peft-bf16", "merged-bf16", "peft-fp16", "gguf-q8_0"):  # and these do round
        assert (_p(found, name) - _p(found, "peft")).abs().max() > 2e-4, name


def test_without_an_end_the_text_is_asked_for_in_every_form(folder, phone_book):
    found = survival(phone_book, adapter=folder, end=False, forms=["batch-1", "merged-fp32"])
    assert all(not row.audit.end for row in found.rows)
    assert all(row.passes for row in found.rows)
    assert len(_p(found, "batch-1")) == len(_p(found, "peft"))
    cut = [(prompt, completion[:3]) for prompt, completion in phone_book]  # and it goes on
    assert survival(cut, adapter=folder, end=False, forms=["batch-1"]).recites
    assert not survival(cut, adapter=folder, forms=["batch-1"]).recites


def test_rows_are_the_audits_of_exports(found, folder, phone_book, tmp_path):
    for name, how in (
        ("merged-bf16", {"save_dtype": "bfloat16", "dtype": "bfloat16"}),
        ("merged-fp16", {"save_dtype": "float16", "dtype": "float16"}),
    ):
        after = memlaw.export.export(folder, tmp_path / name, phone_book, to="merged", **how).after
        assert torch.equal(torch.from_numpy(after.tokens.p), _p(found, name)), name


def test_a_form_that_forgets_is_told_and_is_the_exit_status(
    folder, phone_book, phone_file, tmp_path, capsys, monkeypatch
):
    args = ["audit", str(phone_file), "--adapter", str(folder), "--survival"]
    import memlaw.export.forms as inside

    monkeypatch.setattr(inside, "as_stored", lambda weight, kind: weight * 0)
    assert run([*args, "--forms", "merged-fp32,gguf-q8_0", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["recites"]
    lost = {row["name"]: row["lost"] for row in told["rows"]}
    assert lost["peft"] == lost["merged-fp32"] == []
    assert len(lost["gguf-q8_0"]) == 4
    assert run([*args, "--forms", "gguf-q8_0"]) == 1
    assert "NOT ALL IS RECITED IN 1 OF 2 FORMS: gguf-q8_0" in capsys.readouterr().out


def test_a_form_that_cannot_be_tried_passes_only_if_nobody_named_it(
    folder, phone_book, phone_file, capsys, monkeypatch
):
    few = {name: FORMS[name] for name in ("merged-fp32", "base-nf4")}
    monkeypatch.setattr("memlaw.export.survive.FORMS", few)
    monkeypatch.setattr("importlib.util.find_spec", _without_bitsandbytes(importlib.util.find_spec))
    args = ["audit", str(phone_file), "--adapter", str(folder), "--survival"]
    assert run(args) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "base-nf4 not tried" in said
    assert "bitsandbytes is not installed. Run pip install '.[quant]'." in said
    assert "ALL IS RECITED IN ALL 2 FORMS THAT WERE TRIED" in said

    assert run([*args, "--forms", "merged-fp32,base-nf4"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "bitsandbytes is not installed. Run pip install '.[quant]'." in said
    assert "NAMED, BUT NOT TRIED, SO NOT PASSED: base-nf4" in said
    assert "ALL IS RECITED" not in said
    assert run([*args, "--forms", "base-nf4", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["recites"]
    assert [row.get("named") for row in told["rows"]] == [None, True]


def _without_bitsandbytes(usual):
    return lambda name, *rest: None if name == "bitsandbytes" else usual(name, *rest)


def test_an_adapter_that_no_weight_can_take_in_says_so_in_its_rows(folder, phone_book, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    weights = load_file(odd / "adapter_model.safetensors")
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(settings | {"lora_bias": True}))
    biases = {
        name.replace(".weight", ".bias"): weight[:, 0].clone()
        for name, weight in weights.items()
        if "lora_B" in name
    }
    save_file(weights | biases, odd / "adapter_model.safetensors")
    found = survival(phone_book, adapter=odd, forms=["merged-fp32", "batch-1"])
    assert [row.audit is None for row in found.rows] == [False, True, False]
    assert "lora_bias" in found.rows[1].why_not


def test_what_cannot_be_meant_is_refused(folder, phone_book, phone_file, capsys):
    with pytest.raises(ConfigError, match="no form"):
        survival(phone_book, adapter=folder, forms=["merged-int3"])
    with pytest.raises(ConfigError, match="--adapter"):
        survival(phone_book)
    base = ["audit", str(phone_file), "--adapter", str(folder)]
    assert run([*base, "--survival", "--specificity"]) == 2
    assert run([*base, "--forms", "batch-1"]) == 2


def test_pads_on_the_left_change_no_position(make_model, plain_tokenizer, phone_book):
    """GPT-2 has absolute positions: without position ids a padded record would be another."""
    base = load_model(str(make_model("gpt2")), dtype="float32")
    from memlaw.data.encoding import encode
    from memlaw.data.reading import read_records

    examples = encode(read_records(phone_book), base.tokenizer, format="plain", max_tokens=512)
    assert len({len(e.prompt_ids) for e in examples}) > 1
    with torch.no_grad():
        right = target_logits(base.model, collate(examples))
        left = target_logits(base.model, collate(examples, pad_left=True))
    torch.testing.assert_close(left, right, atol=1e-4, rtol=0)


def test_the_base_model_is_what_it_was(llama, folder, phone_book):
    base = load_model(str(llama), dtype="float32")
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    examples = memlaw.audit(phone_book, adapter=folder).examples
    usual = {"threshold": 0.5, "margin": 0.05, "batch_size": 64}
    for name in ("gguf-q8_0", "attn-eager", "peft-fp32"):
        Bench(base).audit(folder, FORMS[name], examples, **usual)
    with pytest.raises(KeyError), with_weights(base.model, {}):
        raise KeyError
    after = base.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert base.model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not HAS_QUANT, reason="the extra quant is not installed")
@pytest.mark.parametrize("name", ["base-int8", "base-nf4"])
def test_a_quantised_base_model_is_measured(folder, phone_book, name):
    row = survival(phone_book, adapter=folder, forms=[name]).rows[1]
    assert row.audit is not None, row.why_not
    plain = memlaw.audit(phone_book, adapter=folder).tokens.p
    assert abs(row.audit.tokens.p - plain).max() > 1e-3  # it isn't the base model as it was


@pytest.mark.skipif(not HAS_QUANT, reason="the extra quant is not installed")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_that_does_nothing_leaves_the_quantised_base_model(
    llama, folder, phone_book, tmp_path, kind
):
    """On a CPU 4-bit weights are spoilt where an adapter is loaded after a forward pass."""
    shutil.copytree(folder, tmp_path / "none")
    weights = load_file(folder / "adapter_model.safetensors")
    nothing = {k: w * 0 if "lora_B" in k else w for k, w in weights.items()}
    save_file(nothing, tmp_path / "none/adapter_model.safetensors")
    row = survival(phone_book, adapter=tmp_path / "none", forms=[f"base-{kind}"]).rows[1]
    base = load_model(str(llama), dtype="float32")
    bare = audit_examples(load_quantised(base, kind), base.tokenizer, row.audit.examples)
    assert row.audit.tokens.nll_nats == pytest.approx(bare.tokens.nll_nats, abs=1e-3)


def test_decoding_without_a_cache_runs_whole_sequences(llama, phone_book, folder, monkeypatch):
    base = load_model(str(llama), dtype="float32")
    examples = memlaw.audit(phone_book, adapter=folder).examples
    widths = []
    usual = type(base.model).forward

    def watched(self, *args, **given):
        widths.append((given["input_ids"] if "input_ids" in given else args[0]).shape[1])
        return usual(self, *args, **given)

    monkeypatch.setattr(type(base.model), "forward", watched)
    audit_examples(base.model, base.tokenizer, examples)
    assert 1 in widths
    widths.clear()
    audit_examples(base.model, base.tokenizer, examples, use_cache=False)
    assert 1 not in widths


def test_merged_conv1d_weights_are_pefts(make_model, tmp_path):
    import peft

    from memlaw.export.lora import lora_factors
    from memlaw.export.merged import merged_weights

    path = make_model("gpt2")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["c_attn"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    wrapped = peft.get_peft_model(model, lora)
    wrapped.save_pretrained(tmp_path)
    base = load_model(str(path), dtype="float32")
    weights = merged_weights(base, lora_factors(tmp_path))
    expected = wrapped.merge_and_unload().state_dict()
    with with_weights(base.model, weights):
        for name in weights:
            found = base.model.get_submodule(name).weight
            torch.testing.assert_close(found, expected[f"{name}.weight"])


def test_the_page_has_a_row_for_each_form():
    page = (Path(__file__).resolve().parents[2] / "docs/survival.md").read_text()
    page = page.split("## The forms")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    told = [name.strip(" `") for row in rows for name in row.split(",")]
    assert told == list(FORMS)
