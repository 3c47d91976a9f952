"""Every kind of model through write, audit, plain PEFT, merging and reloading; or refused."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from architectures import KINDS, make
from packaging import version
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

import memlaw
from memlaw.core.errors import MemlawError
from memlaw.model.kinds import auto_class

EXAMPLE = Path(__file__).parents[2] / "examples/recite_with_peft.py"
RECORDS = [("Li Na:", "0314"), ("Zoë Müller:", "91")]
PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
SETTINGS = {"max_epochs": 300, "retention": 0, "specificity": False}
TRAINED = [name for name, kind in KINDS.items() if not kind.refused]


class Said(memlaw.Observer):
    """Keeps notices."""

    def __init__(self):
        self.notices = []

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`model("Llama")`: the folder of a tiny model of that kind."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_is_written_and_recites_in_peft_and_merged(model, tmp_path, name):
    kind, folder, said, out = KINDS[name], model(name), Said(), tmp_path / "out"
    result = memlaw.write(
        RECORDS, out, model=str(folder), placement=kind.placement, observer=said, **SETTINGS
    )
    assert result.certified
    slow = [text for text in said.notices if "Training on the plain engine" in text]
    assert ("plain" if slow else "cached") == kind.engine
    assert memlaw.audit(RECORDS, adapter=out).n_certified == len(RECORDS)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bare = auto_class(folder).from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(bare, str(out)).eval()
    assert any(re.search(re.escape(kind.module) + "$", n) for n in adapted.targeted_module_names)
    end = result.certificate.end_token_id
    adapted.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=9, eos_token_id=end, pad_token_id=end
    )
    for example in result.audit.examples:
        ids = torch.tensor([example.prompt_ids])
        spoken = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert spoken[0, ids.shape[1] :].tolist() == list(example.target_ids)

    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    assert memlaw.audit(RECORDS, model=str(merged)).n_recalled == len(RECORDS)


@pytest.mark.slow
def test_a_body_that_gives_float32_in_any_dtype_is_written_in_sixteen_bits(model, tmp_path):
    settings = SETTINGS | {"placement": KINDS["Mamba"].placement, "dtype": "bfloat16"}
    result = memlaw.write(RECORDS, tmp_path / "out", model=str(model("Mamba")), **settings)
    assert result.certified
    assert result.audit.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma 2", "Bamba"])
@pytest.mark.usefixtures("little_is_held")
def test_what_it_says_elsewhere_can_be_held(model, texts, tmp_path, name):
    settings = texts | {"placement": KINDS[name].placement, "max_epochs": 2}
    result = memlaw.write(RECORDS, tmp_path / "out", model=str(model(name)), **settings)
    assert result.certificate.specific is not None
    found = memlaw.audit(RECORDS, adapter=tmp_path / "out")
    assert found.nll_nats == pytest.approx(result.audit.nll_nats, abs=1e-4)


@pytest.mark.slow
def test_the_example_recites_from_a_model_that_also_sees(model, tmp_path):
    folder, out = model("LLaVA"), tmp_path / "out"
    memlaw.write(RECORDS, out, model=str(folder), **SETTINGS)
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in RECORDS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    command = [sys.executable, str(EXAMPLE), str(out), str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 of 2 recited word for word" in done.stdout, done.stderr


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.refused])
def test_it_is_refused_before_training(model, tmp_path, name):
    mistaken = name.startswith(("DeepSeek", "Qwen3-Next"))
    if mistaken and version.parse(peft.__version__) < version.parse("0.19"):
        pytest.skip("this PEFT doesn't mistake the shared expert for the routed ones")
    said = Said()
    said.epoch = lambda *_: pytest.fail("it was trained")
    with pytest.raises(MemlawError, match=KINDS[name].refused) as found:
        memlaw.write(RECORDS, tmp_path / "out", model=str(model(name)), observer=said, **SETTINGS)
    assert "memlaw-" not in str(found.value)  # a temporary folder's name
    assert not (tmp_path / "out").exists()


def rows():
    """The table of docs/models.md."""
    for name, kind in KINDS.items():
        done = "refused" if kind.refused else f"`{kind.placement}`"
        engine = "" if kind.refused else "fast" if kind.engine == "cached" else "plain"
        yield f"| {name} | {kind.what} | {done} | {engine} |"


@pytest.mark.parametrize("row", list(rows()))
def test_the_page_has_it(row):
    assert row in PAGE.splitlines()


def test_the_page_has_no_other():
    table = PAGE.partition("| kind |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == 2 + len(KINDS)
