"""Which adapter answers; all of them in one model; and the same folder on the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlaw
from memlaw import cli
from memlaw.cli.dispatch import run
from memlaw.core.errors import AdapterError, ConfigError, OutputError
from memlaw.export.run import export
from memlaw.measure import session
from memlaw.shards import loading
from memlaw.shards.loading import BARE
from memlaw.writer.publish import push

HOME = {"Jerry Becerra:": "shard-0001", "Li Na:": "shard-0002", "Cy Ro:": "shard-0003"}


def test_a_records_prompt_finds_its_adapter_and_its_completion(written, book):
    for prompt, name in HOME.items():
        answer = memlaw.ask(written, prompt)
        assert (answer.text, answer.adapter, answer.likeness) == (dict(book)[prompt], name, None)
        assert answer.on_record
    as_chat = memlaw.ask(written, [{"role": "user", "content": "Li Na:"}])
    assert as_chat.adapter == "shard-0002"


def test_another_prompt_goes_to_the_nearest_or_under_the_threshold_to_the_bare_model(written):
    near = memlaw.ask(written, "Jerry Becera:", threshold=-1)
    assert near.adapter in HOME.values()
    assert near.likeness < 1
    bare = memlaw.ask(written, "Jerry Becera:", threshold=1.01, max_tokens=4)
    assert (bare.adapter, bare.likeness) == ("", near.likeness)
    assert memlaw.ask(written, "Jerry Becera:", max_tokens=4).likeness == near.likeness


def test_nearest_is_by_the_bare_models_last_hidden_state(written, llama, book):
    """Of a prompt with one more word the record that it was made of, by hand."""
    loaded = memlaw.load(written)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert loaded.router.threshold == memlaw.load(written).router.threshold

    @torch.no_grad()
    def state(prompt):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return model.model(**ids).last_hidden_state[0, -1]

    router, asked = loaded.router, "Ann Oyelaran now:"
    states = torch.stack([state(prompt) for prompt, _ in book])

    def standard(x):
        return torch.nn.functional.normalize((x - router.mean) / router.spread, dim=-1)

    likeness = standard(states) @ standard(state(asked))
    route = router.route(asked)
    assert route.likeness == pytest.approx(float(likeness.max()), abs=0.01)
    if route.adapter:
        assert route.adapter == f"shard-{int(likeness.argmax()) // 2 + 1:04}"


def test_one_model_has_all_adapters_and_answers_each_prompt_with_its_own(written, llama, book):
    model = AutoModelForCausalLM.from_pretrained(llama)
    loaded = memlaw.load(written, model, tokenizer=AutoTokenizer.from_pretrained(llama))
    assert set(loaded.model.peft_config) == set(HOME.values())
    assert loaded.generate([prompt for prompt, _ in book]) == [said for _, said in book]
    names = loaded.names([*HOME, "Cy Ro:"])
    assert names == [*HOME.values(), "shard-0003"]
    loaded.router.threshold = 1.01
    assert loaded.names(["Who?"]) == [BARE]


def test_a_mixed_batch_goes_through_peft_by_name(written, llama, book):
    loaded = memlaw.load(written, AutoModelForCausalLM.from_pretrained(llama))
    tokenizer, prompts = loaded.tokenizer, [*HOME]
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = loaded.model.generate(
        **ids, adapter_names=loaded.names(prompts), max_new_tokens=12, do_sample=False
    )
    said = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == [dict(book)[prompt] for prompt in prompts]


def test_a_folder_of_one_adapter_loads_alike(written, book):
    loaded = memlaw.load(written / "shards" / "shard-0001")
    assert loaded.names(["Jerry Becerra:"]) == ["default"]
    assert loaded.generate(["Jerry Becerra:"]) == [book[0][1]]


def test_another_base_model_is_refused(written, make_model):
    other = make_model("llama", seed=1)
    with pytest.raises(AdapterError, match="another base model"):
        memlaw.load(written, AutoModelForCausalLM.from_pretrained(other))


def test_without_the_private_key_nobody_can_tell_and_a_shard_can_still_be_asked(folder, book):
    (folder / "private" / "openings.json").unlink()
    with pytest.raises(OutputError, match="name a shard"):
        memlaw.ask(folder, "Jerry Becerra:")
    assert memlaw.ask(folder / "shards" / "shard-0001", "Jerry Becerra:").text == book[0][1]


@pytest.mark.slow
def test_the_command_line_writes_asks_updates_and_checks(book, settings, tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"

    def say(pairs):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
        data.write_text("\n".join(lines))

    say(book[:3])
    how = ["--no-specificity", "--retention", "0", "--max-epochs", "300"]
    for name in ("model", "retain", "damage_text"):
        how += [f"--{name.replace('_', '-')}", settings[name]]
    assert cli.run(["write", str(data), "-o", str(out), "--shards", "3", *how]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert cli.run(["ask", str(out), book[2][0]]) == 0
    assert capsys.readouterr().out == book[2][1]
    say([*book[:2], (book[2][0], "555")])
    assert cli.run(["update", str(out), str(data)]) == 0
    said = capsys.readouterr().out
    assert "shard-0003" in said
    assert cli.run(["audit", str(data), "--certificate", str(out / "certificate.json")]) == 0
    assert "THE CERTIFICATE HOLDS" in capsys.readouterr().out
    say(book[:3])
    assert cli.run(["audit", str(data), "--certificate", str(out / "certificate.json")]) == 1
    assert cli.run(["log", str(out)]) == 0


def test_what_is_about_shards_is_refused_elsewhere(written, book, tmp_path, capsys):
    (prompt, _), one = book[0], written / "shards/shard-0001"
    with pytest.raises(ConfigError, match="threshold is about shards"):
        memlaw.ask(one, prompt, threshold=0.5)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert run(["write", str(data), "-o", str(tmp_path / "out"), "--launcher", "ray"]) == 2
    assert "--launcher is about shards" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_who_takes_a_folder_of_shards_for_an_adapter_is_told_of_them(written, book, tmp_path):
    for call in (
        lambda: memlaw.audit(book, adapter=written),
        lambda: export(written, tmp_path / "out", book, to="merged"),
        lambda: push(written, "me/book", dry_run=True),
    ):
        with pytest.raises(AdapterError, match="shards/shard-0001"):
            call()


def test_a_model_is_loaded_once_for_a_prompt_that_has_to_be_found(written, monkeypatch):
    loaded = []
    for room in (loading, session):
        usual = room.load_model
        monkeypatch.setattr(
            room, "load_model", lambda *a, usual=usual, **k: (loaded.append(a), usual(*a, **k))[1]
        )
    memlaw.ask(written, "nobody's prompt", threshold=-1.0)
    assert len(loaded) == 1


def test_the_certificate_over_all_is_the_one_that_is_named(written, book, tmp_path, capsys):
    data, renamed = tmp_path / "data.jsonl", tmp_path / "renamed.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in book))
    renamed.write_text("\n".join(json.dumps({"name": p, "phone": c}) for p, c in book))
    own = written / "certificate.json"

    def check(data, certificate, *more):
        given = ["audit", str(data), "--certificate", str(certificate), *more]
        return cli.run(given), capsys.readouterr()

    assert check(data, written / "nowhere.json")[0] == 2
    fields = ("--prompt-field", "name", "--completion-field", "phone")
    assert check(renamed, own, *fields)[0] == 0
    status, said = check(data, own, "--tokens", str(tmp_path / "tokens.parquet"))
    assert status == 2
    assert "audit one of them" in said.err
    with data.open("a") as file:
        file.write('\n{"prompt": "Eve Mora:", "completion": 5}')
    status, said = check(data, own)
    assert status == 2
    assert "data.jsonl:7" in said.err


@pytest.mark.slow
def test_what_cannot_be_checked_of_shards_is_told(folder, book, texts, tmp_path, capsys):
    """As where a text that damage was measured on isn't here."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in book))
    for path in folder.glob("shards/*/private/openings.json"):
        path.unlink()
    given = ["audit", str(data), "--certificate", str(folder / "certificate.json")]
    assert cli.run(given) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "not checked: shard-0001: that these are the certified records" in said
    assert "NOTHING SPEAKS AGAINST THE CERTIFICATE" in said
    assert cli.run([*given, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["mismatches"] == []
    assert len(content["unchecked"]) == 3
