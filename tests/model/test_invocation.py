"""Activated adapters: what PEFT's model answers, and the bare model's bits where they are off."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.auto import AutoModelForCausalLM

import memlaw
from memlaw.core.errors import AdapterError, ConfigError
from memlaw.data.activation import last_start
from memlaw.measure.decode import greedy_decode
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.formats import invocation_ids, loaded_adapter, save_adapter
from memlaw.model.invocation import Invocation
from memlaw.model.sites import resolve_sites

IDS = (20, 21)
WITH = (7, 8, 20, 21, 9, 10, 11)
WITHOUT = (7, 8, 21, 20, 9)
TWICE = (20, 21, 5, 6, 20, 21, 5, 30, 31)
AT_THE_END = (3, 4, 5, 20, 21)
ROWS = {"with": WITH, "without": WITHOUT, "twice": TWICE, "at the end": AT_THE_END}
SETTINGS = {
    "plain": {"target_modules": ["down_proj"]},
    "rslora": {"target_modules": ["down_proj"], "use_rslora": True, "lora_alpha": 24},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
}


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """`saved("plain")`: a folder that PEFT wrote, of a random activated adapter."""
    done = {}

    def save(case):
        if case not in done:
            done[case] = tmp_path_factory.mktemp("alora") / "adapter"
            model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
            config = LoraConfig(
                task_type="CAUSAL_LM", r=4, alora_invocation_tokens=list(IDS), **SETTINGS[case]
            )
            torch.manual_seed(1)
            wrapped = get_peft_model(model, config)
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            wrapped.save_pretrained(done[case])
        return done[case]

    return save


def _peft(llama, folder, dtype="float32"):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, str(folder)).eval()


def _batch(rows, side):
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), 2)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SETTINGS)
@torch.no_grad()
def test_a_folder_gives_the_logits_that_peft_gives(llama, saved, case, side):
    batch = _batch(list(ROWS.values()), side)
    expected = _peft(llama, saved(case))(**batch).logits
    base = load_model(llama)
    bare = base.model(**batch).logits
    with loaded_adapter(saved(case), base.model) as adapted:
        found = adapted(**batch).logits
        again = adapted(**batch).logits
    assert torch.equal(found, expected)
    assert torch.equal(found, again)
    assert torch.equal(base.model(**batch).logits, bare)  # and nothing stays behind
    changed = (found != bare).any(dim=2)
    for row, (name, ids) in enumerate(ROWS.items()):
        start = last_start(ids, IDS)
        offset = 0 if side == "right" else batch["input_ids"].shape[1] - len(ids)
        real = changed[row, offset : offset + len(ids)].tolist()
        assert real == [start is not None and i >= start for i in range(len(ids))], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_decoded_as_peft_does(llama, saved, dtype):
    base = load_model(llama, dtype=dtype)
    rows = list(ROWS.values())
    with loaded_adapter(saved("plain"), base.model) as adapted:
        found = greedy_decode(adapted, rows, end_id=2, max_tokens=[12] * len(rows))
    bare = greedy_decode(base.model, rows, end_id=2, max_tokens=[12] * len(rows))
    said = _peft(llama, saved("plain"), dtype).generate(
        **_batch(rows, "left"), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    for row, ids in zip(said[:, len(TWICE) :].tolist(), found, strict=True):
        assert tuple(row[: len(ids)]) == ids
    same = [a == b for a, b in zip(found, bare, strict=True)]
    assert same == [False, True, False, False]


def _adapter(sites, invocation_ids=IDS):
    adapter = Adapter(sites, rank=3, seed=0, invocation_ids=invocation_ids)
    with torch.no_grad():
        for i, b in enumerate(adapter.b):
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return adapter


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_our_own_adapter_computes_what_its_folder_does(make_model, architecture, dtype, tmp_path):
    base = load_model(make_model(architecture), dtype=dtype)
    adapter = _adapter(resolve_sites(base.model, "down_proj", (1, 2)))
    save_adapter(adapter, tmp_path, base_path=base.path, base_sha256=base.sha256)
    assert invocation_ids(tmp_path) == IDS
    rows = list(ROWS.values())
    for side in ("left", "right"):
        batch = _batch(rows, side)
        real = batch["attention_mask"].bool()
        with adapter.folded().attached(base.model):
            own = base.model(**batch).logits[real]
        with loaded_adapter(tmp_path, base.model) as adapted:
            assert torch.allclose(own, adapted(**batch).logits[real], atol=1e-4, rtol=1e-4)
    decoded = []
    for context in (adapter.attached(base.model), loaded_adapter(tmp_path, base.model)):
        with context as adapted:
            decoded.append(greedy_decode(adapted, rows, end_id=2, max_tokens=[9] * len(rows)))
    assert decoded[0] == decoded[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_without_the_tokens_every_bit_is_the_bare_models(llama, dtype):
    base = load_model(llama, dtype=dtype)
    sites = resolve_sites(base.model, "all-linear", "all")
    batch = _batch([WITHOUT, WITH, (20,), (1, 2, 3)], "right")
    bare = base.model(**batch).logits
    with _adapter(sites).attached(base.model):
        found = base.model(**batch).logits
    rows = [0, 2, 3]
    assert torch.equal(found[rows], bare[rows])
    start = last_start(WITH, IDS)
    assert torch.equal(found[1, :start], bare[1, :start])
    assert not torch.equal(found[1, start], bare[1, start])
    with _adapter(sites, ()).attached(base.model):  # so without the rule they would differ
        assert not torch.equal(base.model(**batch).logits[0], bare[0])


@torch.no_grad()
def test_a_cache_goes_on_where_the_prompt_stood(llama):
    base = load_model(llama)
    adapter = _adapter(resolve_sites(base.model, "down_proj", (1,)))
    prompts = torch.tensor([[7, 20, 21, 9], [7, 21, 20, 9]])
    then = torch.tensor([[30, 31], [20, 21]])  # the second row gets the tokens too late
    whole = torch.cat([prompts, then], dim=1)
    with adapter.attached(base.model):
        expected = base.model(whole[:1]).logits
        first = base.model(prompts, use_cache=True)
        second = base.model(then, past_key_values=first.past_key_values, use_cache=True)
        base.model(prompts)
        with pytest.raises(AdapterError, match="key-value cache of the pass before"):
            base.model(then, past_key_values=first.past_key_values)
    bare = base.model(whole[1:]).logits
    assert torch.allclose(second.logits[0], expected[0, 4:], atol=1e-4)
    assert torch.allclose(second.logits[1], bare[0, 4:], atol=1e-4)


def test_a_pad_is_no_text(llama):
    base = load_model(llama)
    invocation = Invocation((2,))  # the token that pads
    with invocation.watching(base.model):
        base.model(**_batch([(5, 2, 6, 7), (5, 6)], "right"))
        assert invocation.starts.tolist() == [1, 4]
        base.model(**_batch([(5, 2, 6, 7), (5, 6)], "left"))
        assert invocation.offsets() == [3, None]
        assert invocation.mask().tolist() == [[False, True, True, True], [False] * 4]


def test_without_token_ids_it_refuses(llama, saved):
    base = load_model(llama)
    embedded = base.model.get_input_embeddings()(torch.tensor([WITH]))
    with (
        loaded_adapter(saved("plain"), base.model) as adapted,
        pytest.raises(AdapterError, match="inputs_embeds"),
    ):
        adapted(inputs_embeds=embedded)


@pytest.mark.parametrize("ids", [[], "text", [1, "2"], [True], 5])
def test_a_config_without_proper_token_ids_is_refused(llama, saved, tmp_path, ids):
    for file in saved("plain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"alora_invocation_tokens": ids})
    )
    with (
        pytest.raises(AdapterError, match="alora_invocation_tokens is"),
        loaded_adapter(tmp_path, load_model(llama).model),
    ):
        pass


def test_an_activated_head_is_refused(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], alora_invocation_tokens=[5]
    )
    get_peft_model(model, config).save_pretrained(tmp_path)
    with (
        pytest.raises(AdapterError, match="activated adapter of lm_head"),
        loaded_adapter(tmp_path, load_model(llama).model),
    ):
        pass


def test_a_block_cannot_be_activated(llama):
    sites = resolve_sites(load_model(llama).model, "mlp", (1,))
    with pytest.raises(ConfigError, match="linear modules only"):
        Adapter(sites, rank=2, seed=0, invocation_ids=IDS)


def test_an_audit_measures_what_peft_computes(llama, saved):
    base = load_model(llama)
    tokenizer = base.tokenizer
    records = [(f"{tokenizer.decode(ids)}", "4711") for ids in (WITH, TWICE, WITHOUT)]
    model = _peft(llama, saved("plain"))
    expected, bare = [], []
    for prompt, completion in records:
        ids = tokenizer(prompt)["input_ids"]
        targets = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        given = torch.tensor([ids + targets])
        for found, of in ((expected, model), (bare, base.model)):
            logits = of(given).logits[0, len(ids) - 1 : -1]
            found += torch.nn.functional.cross_entropy(
                logits, torch.tensor(targets), reduction="none"
            ).tolist()
    audit = memlaw.audit(records, adapter=saved("plain"), model=str(llama), prompt_format="plain")
    assert audit.tokens.nll_nats.tolist() == pytest.approx(expected, abs=1e-4)
    assert expected[10:] == pytest.approx(bare[10:], abs=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in zip(expected[:10], bare[:10], strict=True))
