"""From records to a certificate, on six architectures and in every placement and objective.

What `write` leaves in its folder must be what it measured: the audit from disk, the certificate's
check, plain PEFT without this package, and `ask` have to agree with it.
"""

import functools
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw

_write = functools.partial(memlaw.write, specificity=False)

pytestmark = pytest.mark.slow

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def written(make_model, phone_book, tmp_path_factory):
    """`written("llama")`: the phone book, written into that model with default settings."""
    done = {}

    def write(name):
        if name not in done:
            out = tmp_path_factory.mktemp("written") / name
            model = make_model(name)
            done[name] = _write(phone_book, out, model=str(model), max_epochs=300, retention=0)
        return done[name]

    return write


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_settings_certify_every_record(written, name):
    result = written(name)
    assert result.certified
    assert result.stopped_because == "certified"
    assert result.certificate.n_certified == 4
    assert all(r.min_p >= 0.55 and r.decoded_recalled for r in result.audit.records)
    assert all(r.cascade_tokens == 0 and r.first_failure is None for r in result.audit.records)
    assert 0 < result.bits_per_parameter < 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_audit_of_the_folder_agrees_with_the_run_token_for_token(written, phone_book, name):
    result = written(name)
    found = memlaw.audit(phone_book, adapter=result.out)
    assert found.certified
    assert found.dtype == "float32"
    for column in ("record", "position", "token_id", "argmax_id"):
        np.testing.assert_array_equal(
            getattr(found.tokens, column), getattr(result.audit.tokens, column)
        )
    np.testing.assert_allclose(found.tokens.p, result.audit.tokens.p, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        found.tokens.margin_nats, result.audit.tokens.margin_nats, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_certificate_holds_when_measured_again(written, phone_book, name):
    out = written(name).out
    check = memlaw.check_certificate(out / "certificate.json", phone_book)
    assert check.mismatches == ()
    assert check.holds


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_peft_recites_the_records_and_stops(written, make_model, phone_book, name):
    folder = make_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(written(name).out)).eval()
    for prompt, completion in phone_book:
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            ids = tokenizer(prompt, return_tensors="pt")
        said = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(said[:-1]) == completion
        assert said[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ask_gives_the_completion(written, phone_book, name):
    prompt, completion = phone_book[3]
    answer = memlaw.ask(written(name).out, prompt)
    assert answer.text == completion
    assert answer.finished


def test_ask_that_is_cut_off_says_so(written, phone_book):
    answer = memlaw.ask(written("llama").out, phone_book[0][0], max_tokens=3)
    assert answer.text == phone_book[0][1][:3]
    assert not answer.finished


def test_the_bare_model_recalls_nothing(make_model, phone_book):
    found = memlaw.audit(phone_book, model=str(make_model("llama")))
    assert found.n_recalled == 0
    assert found.n_certified == 0
    assert all(r.first_failure is not None for r in found.records)
    assert not found.passed


PLACEMENTS = {
    # settings: modules adapted in each layer
    "mlp": ["mlp"],
    "attn": [f"self_attn.{x}_proj" for x in "qkvo"],
    "all-linear": [f"self_attn.{x}_proj" for x in "qkvo"]
    + [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    "q_proj,v_proj": ["self_attn.q_proj", "self_attn.v_proj"],
    "up_proj": ["mlp.up_proj"],
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_reaches_a_certificate_that_holds(llama, phone_book, tmp_path, placement):
    # Layer 1 of 3, so that what attention is given to read reaches the head.
    settings = {"placement": placement, "layers": 1, "rank": 16, "max_epochs": 600, "retention": 0}
    result = _write(phone_book, tmp_path / "out", model=str(llama), **settings)
    assert result.certified
    assert memlaw.check_certificate(tmp_path / "out" / "certificate.json", phone_book).holds
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [site["module"] for site in run["adapter"]["sites"]] == [
        f"model.layers.1.{module}" for module in PLACEMENTS[placement]
    ]


def test_the_parallel_mlp_adapter_is_saved_in_its_own_open_format(llama, phone_book, tmp_path):
    result = _write(
        phone_book,
        tmp_path / "out",
        model=str(llama),
        placement="mlp",
        rank=16,
        max_epochs=300,
        retention=0,
    )
    assert result.certified
    files = {p.name for p in result.out.iterdir()}
    assert {"memlaw_adapter.json", "memlaw_adapter.safetensors"} <= files
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files
    assert result.n_parameters == 16 * (64 + 64)
    assert memlaw.ask(result.out, phone_book[0][0]).text == phone_book[0][1]
    assert "memlaw ask" in (result.out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("layers", "adapted"), [((0, 1), [0, 1]), ("all", [0, 1, 2]), ("auto", [2]), (0, [0])]
)
def test_the_layers_asked_for_are_the_layers_adapted(llama, phone_book, tmp_path, layers, adapted):
    result = _write(
        phone_book,
        tmp_path / "out",
        model=str(llama),
        layers=layers,
        rank=16,
        max_epochs=300,
        retention=0,
    )
    assert result.certified
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [site["layer"] for site in run["adapter"]["sites"]] == adapted
    assert memlaw.check_certificate(tmp_path / "out" / "certificate.json", phone_book).holds


OBJECTIVES = {
    "sft": {},
    "memft_threshold": {},
    "memft_threshold, training on when nothing is left": {"on_empty": "sft"},
    "memft_window": {},
    "memft_curriculum": {"curriculum_epochs": (5, 10, 15, 20)},
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_every_objective_reaches_a_certificate(llama, phone_book, tmp_path, case):
    result = _write(
        phone_book,
        tmp_path / "out",
        model=str(llama),
        objective=case.partition(",")[0],
        batch_size=2,
        max_epochs=400,
        retention=0,
        **OBJECTIVES[case],
    )
    assert result.certified


def test_the_guarantee_is_for_the_dtype_it_was_measured_in(llama, phone_book, tmp_path):
    result = _write(
        phone_book,
        tmp_path / "out",
        model=str(llama),
        dtype="bfloat16",
        max_epochs=300,
        retention=0,
    )
    assert result.certified
    assert result.certificate.dtype == "bfloat16"
    assert "bfloat16" in result.certificate.statement
    path = tmp_path / "out" / "certificate.json"
    assert memlaw.check_certificate(path, phone_book).holds
    elsewhere = memlaw.check_certificate(path, phone_book, dtype="float32")
    assert elsewhere.mismatches == ("measured in float32, but certified for bfloat16",)


@pytest.mark.parametrize(("max_rank", "grown_to"), [(64, 16), (12, 12)])
def test_an_automatic_rank_grows_when_nothing_improves(llama, tmp_path, max_rank, grown_to):
    notices = []
    observer = memlaw.Observer()
    observer.notice = notices.append
    result = _write(
        [("Jerry Becerra:", "910067")],
        tmp_path / "out",
        model=str(llama),
        max_rank=max_rank,
        learning_rate=1e-9,  # so that nothing can improve
        max_epochs=60,
        observer=observer,
    )
    curve = json.loads((tmp_path / "out" / "run.json").read_text())["curve"]
    ranks = [epoch["rank"] for epoch in curve]
    assert ranks == sorted(ranks)
    assert set(ranks) == {8, grown_to}
    assert result.rank == grown_to
    assert f"No progress: rank raised to {grown_to}." in notices
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (grown_to, grown_to)


def test_a_rank_that_was_asked_for_does_not_grow(llama, tmp_path):
    settings = {"rank": 2, "learning_rate": 1e-9, "max_epochs": 60}
    result = _write([("Li Na:", "031415")], tmp_path / "out", model=str(llama), **settings)
    assert not result.certified
    assert result.rank == 2


def test_a_long_text_is_recited_to_the_last_space(llama, tmp_path):
    text = "  The ring,\n\n\tthe  rain \r\nand Zoë's 31 ones.\n "
    (tmp_path / "text.txt").write_bytes(text.encode())
    result = _write(
        tmp_path / "text.txt", tmp_path / "out", model=str(llama), max_epochs=300, retention=0
    )
    assert result.certified
    assert memlaw.ask(result.out).text == text
