"""The command line: what it prints, what it exits with, and how it turns down bad requests."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import memlaw
from memlaw import cli
from memlaw.certify.check import check_certificate
from memlaw.model.base import load_model


@pytest.fixture(autouse=True)
def usual_sigterm():
    """The command line takes SIGTERM for itself; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(capsys):
    """`run("audit", ...)`: exit status, standard output and standard error of a command."""

    def call(*args):
        capsys.readouterr()
        try:
            status = cli.run([str(a) for a in args])
        except SystemExit as leaving:  # the parser's own way out
            status = leaving.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture(scope="module")
def finished(llama, phone_file, tmp_path_factory):
    """A certified run's folder; copy it before changing anything."""
    out = tmp_path_factory.mktemp("finished") / "out"
    settings = {"max_epochs": 300, "retention": 0, "specificity": False}
    assert memlaw.write(phone_file, out, model=str(llama), **settings).certified
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of a certified run's folder."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def finished_whole(llama, phone_file, tmp_path_factory):
    """The same, with every kind of harm measured, and none held back: that trains for long."""
    out = tmp_path_factory.mktemp("whole") / "out"
    settings = {"max_epochs": 300, "retention": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memlaw.WriteConfig, "holds", False)
        assert memlaw.write(phone_file, out, model=str(llama), **settings).certified
    return out


@pytest.fixture
def whole_copy(finished_whole, tmp_path):
    """A copy of that."""
    return shutil.copytree(finished_whole, tmp_path / "whole")


def _flat(text):
    """Printed text with its line breaks and padding taken out."""
    return " ".join(text.split())


# ---------------------------------------------------------------- the program itself


def test_help_names_every_command(run):
    for args in (["--help"], ["-h"], ["help"]):
        status, out, err = run(*args)
        assert (status, err) == (0, "")
        assert all(f"  {name} " in out for name in ("write", "audit", "ask"))


def test_no_command_is_a_bad_request_with_help(run):
    status, out, _ = run()
    assert status == 2
    assert out.startswith("usage: memlaw COMMAND")


def test_version(run):
    assert run("--version") == (0, f"memlaw {memlaw.__version__}\n", "")


def test_python_m_is_the_same_command():
    words = [sys.executable, "-m", "memlaw", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"memlaw {memlaw.__version__}\n")


def test_an_unknown_command_is_named(run):
    status, out, err = run("wirte", "x")
    assert (status, out) == (2, "")
    assert err == (
        "memlaw: no command 'wirte'. There are write, audit, diff, update, log, revert, ask, "
        "export, push, sign, verify, report, probe, fit, plan, bench; see 'memlaw --help'.\n"
    )


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("write", ["--rank", "--objective", "--resume", "--out", "--config", "--threshold"]),
        ("audit", ["--adapter", "--certificate", "--decode", "--json", "--tokens"]),
        ("ask", ["--model", "--max-tokens"]),
    ],
)
def test_each_command_explains_its_flags(run, command, flags):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert all(flag in out for flag in flags)


@pytest.mark.parametrize(
    "args",
    [
        ["write", "data.jsonl", "-o", "out", "--learning-rte", "1"],
        ["write", "data.jsonl"],
        ["write", "data.jsonl", "-o", "out", "--rank", "many"],
        ["write", "data.jsonl", "-o", "out", "--objective", "dpo"],
        ["audit"],
        ["ask"],
    ],
)
def test_arguments_that_cannot_be_parsed_exit_with_2(run, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*args)
    assert status == 2
    assert err.strip()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- write


@pytest.mark.slow
@pytest.mark.usefixtures("little_is_held")
def test_write_certifies_and_says_where_everything_is(run, llama, phone_file, tmp_path):
    out = tmp_path / "new" / "out"
    status, said, _ = run("write", phone_file, "-o", out, "--model", llama, "--rank", 8)
    assert status == 0
    assert "certified 4 of 4" in _flat(said)
    assert "ΔNLL on documentation" in said
    assert "\nCERTIFIED\nNOT SPECIFIC\n" in said  # nothing holds so small a model
    assert {p.name for p in out.iterdir()} == {
        "answers.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "certificate.json",
        "private",
        "run.json",
        "snapshots.npz",
        "tokens.parquet",
        ".gitignore",
    }
    report = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert report["status"] == "certified"
    assert report["config"]["rank"] == 8
    assert report["records"]["n"] == 4
    assert len(report["curve"]) == report["epochs"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "records certified | 4 of 4" in card
    assert "910067" not in card


@pytest.mark.slow
def test_write_that_gives_up_exits_with_1_and_says_how_to_go_on(run, llama, phone_file, tmp_path):
    out = tmp_path / "out"
    flags = ["--model", llama, "--max-epochs", 1, "--no-specificity"]
    status, said, _ = run("write", phone_file, "-o", out, *flags)
    assert status == 1
    assert "NOT CERTIFIED" in said
    assert "--resume --max-epochs" in said
    assert "first failures" in said
    assert (out / "checkpoint.safetensors").is_file()
    assert json.loads((out / "certificate.json").read_text())["certified"] is False


@pytest.mark.slow
def test_the_command_in_the_model_card_checks_the_certificate(run, finished, phone_file):
    card = (finished / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^memlaw (audit .*)$", card, flags=re.MULTILINE).group(1)
    args = command.replace("RECORDS", str(phone_file)).replace("path/to/this/folder", "{}")
    status, said, _ = run(*args.format(finished).split(" "))
    assert status == 0
    assert "THE CERTIFICATE HOLDS" in said


def test_the_python_in_the_model_card_recites(finished, phone_book, capsys):
    card = (finished / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    prompt, completion = phone_book[1]
    exec(code.replace("path/to/this/folder", str(finished)).replace("PROMPT", prompt), {})
    assert capsys.readouterr().out == completion + "\n"


DIVERGING = {"--learning-rate": 3e37, "--max-epochs": 5}


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_state(
    run, llama, phone_file, tmp_path
):
    out = tmp_path / "out"
    flags = [x for pair in (DIVERGING | {"--batch-size": 2}).items() for x in pair]
    status, said, err = run("write", phone_file, "-o", out, "--model", llama, *flags)
    assert status == 1
    assert "NOT CERTIFIED" in said
    assert "not finite at step 2 (epoch 1)" in _flat(err)
    assert "learning rate" in err
    assert json.loads((out / "certificate.json").read_text())["certified"] is False
    report = json.loads((out / "run.json").read_text())
    assert report["stopped_because"].startswith("diverged")
    assert report["epochs"] == 0
    for file in ("adapter_model.safetensors", "checkpoint.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(out / file).values())


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_at_the_first_step_of_an_epoch(
    run, llama, phone_file, tmp_path
):
    out = tmp_path / "out"
    flags = [x for pair in DIVERGING.items() for x in pair]
    status, said, err = run("write", phone_file, "-o", out, "--model", llama, *flags)
    assert status == 1
    assert "NOT CERTIFIED" in said
    assert "not finite at step 2 (epoch 2)" in _flat(err)
    assert json.loads((out / "certificate.json").read_text())["certified"] is False


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "audit --json"])
def test_a_reader_that_goes_away_is_no_failure(finished, tmp_path, command, unbuffered):
    args = command.split()
    if args[0] == "audit":
        one = tmp_path / "one.jsonl"
        one.write_text('{"prompt": "Li Na:", "completion": "031415"}\n')
        args += [str(one), "--adapter", str(finished)]
    script = "import sys; from memlaw.cli.dispatch import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# ---------------------------------------------------------------- settings from a file


@pytest.mark.slow
def test_settings_come_from_the_file_and_flags_have_the_last_word(run, llama, phone_file, tmp_path):
    (tmp_path / "a.toml").write_text(
        f'model = "{llama}"\nrank = 8\nmax-epochs = 1\nlearning_rate = 2e-3\n'
        'layers = [0, 1]\ncurriculum_epochs = [1, 2, 3, 4]\nobjective = "memft_curriculum"\n'
    )
    out = tmp_path / "out"
    status, _, err = run(
        "write", phone_file, "--config", tmp_path / "a.toml", "-o", out, "--rank", 4
    )
    assert status == 1, err
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["rank"] == 4
    assert config["max_epochs"] == 1
    assert config["learning_rate"] == 2e-3
    assert config["layers"] == [0, 1]
    assert config["curriculum_epochs"] == [1, 2, 3, 4]
    assert config["objective"] == "memft_curriculum"


@pytest.mark.parametrize("form", ["apart", "joined", "in front"])
def test_the_file_is_read_however_the_flag_is_written(run, finished, phone_file, tmp_path, form):
    path = tmp_path / "a.toml"
    path.write_text(f'adapter = "{finished}"\njson = true\ndecode = 1\n')
    args = {
        "apart": [phone_file, "--config", path],
        "joined": [phone_file, f"--config={path}"],
        "in front": ["--config", path, phone_file],
    }[form]
    status, said, _ = run("audit", *args)
    assert status == 0
    assert json.loads(said)["n_decoded"] == 1


def test_a_switch_in_the_file_can_be_turned_off_by_a_flag(run, finished, phone_file, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(f'adapter = "{finished}"\njson = true\n')
    status, said, _ = run("audit", phone_file, "--config", path, "--no-json")
    assert status == 0
    assert "recited word for word" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte = 1\n", "unknown key 'learning_rte'. There are .*learning_rate"),
        ('config = "b.toml"\n', "unknown key 'config'"),
        ('data = "x.jsonl"\n', "unknown key 'data'"),
        ("rank = \n", "not TOML"),
        ("threshold = 0.3\n", "threshold 0.3 is out of range"),
        (None, "can't be read"),
    ],
)
def test_a_bad_settings_file_is_refused(run, phone_file, tmp_path, content, message):
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out"
    status, _, err = run("write", phone_file, "-o", out, "--config", path)
    assert status == 2
    assert re.search(message, _flat(err))
    assert not out.exists()


@pytest.mark.parametrize("count", [0, 2])
def test_the_settings_file_must_be_one(run, phone_file, tmp_path, count):
    path = tmp_path / "a.toml"
    path.write_text("rank = 1\n")
    files = ["--config", path] * count or ["--config"]
    status, _, err = run("write", phone_file, "-o", tmp_path / "out", *files)
    assert status == 2
    assert "--config" in err


# ---------------------------------------------------------------- bad requests

DATA = {
    # name: (file name, bytes or None for no file, pattern of the message)
    "no such file": ("no.jsonl", None, r"no\.jsonl does not exist"),
    "empty": ("a.jsonl", b" \n", r"a\.jsonl is empty"),
    "not JSON": (
        "a.jsonl",
        b'{"prompt": "a", "completion": "1"}\n{oops\n',
        r"a\.jsonl:2: not JSON",
    ),
    "no field": (
        "a.jsonl",
        b'{"name": "a", "completion": "1"}\n',
        r"a\.jsonl:1: no field 'prompt'",
    ),
    "a number": ("a.jsonl", b'{"prompt": "a", "completion": 17}\n', r"a\.jsonl:1: .*a int \(17\)"),
    "nothing": ("a.jsonl", b'{"prompt": "a", "completion": ""}\n', r"a\.jsonl:1: .*is empty"),
    "two answers": (
        "a.csv",
        b"prompt,completion\na,1\nb,2\na,3\n",
        r"a\.csv:2 and a\.csv:4: 'a' -> '1' or '3'",
    ),
    "more cells": ("a.csv", b"prompt,completion\na,1,2\n", r"a\.csv:2: more cells"),
    "not UTF-8": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', r"a\.jsonl:2: not UTF-8"),
    "suffix": ("a.xlsx", b"x", r"a\.xlsx: can't tell .* --data-format"),
    "not Parquet": ("a.parquet", b"PAR1", r"a\.parquet: not a readable Parquet file"),
    "not the assistant": (
        "a.jsonl",
        b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}\n',
        r"a\.jsonl:1: the last message is from 'user'",
    ),
    "special token": (
        "a.jsonl",
        b'{"prompt": "a", "completion": "1<|im_end|>2"}\n',
        r"a\.jsonl:1: .*special token '<\|im_end\|>'",
    ),
    "too long": (
        "a.txt",
        b"0123456789" * 60,
        r"a\.txt: \d+ tokens, but the model's context is 512",
    ),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("command", ["write", "audit"])
def test_bad_data_is_one_message_exit_2_and_no_folder(run, llama, tmp_path, case, command):
    name, content, message = DATA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    flags = ["-o", out] if command == "write" else []
    status, said, err = run(command, tmp_path / name, "--model", llama, *flags)
    assert status == 2
    assert said == ""
    assert err.startswith("memlaw: ")
    assert err.count("memlaw: ") == 1
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not out.exists()


SETTINGS = {
    # flags: pattern of the message
    "--rank 0": "rank is 0; it must be 1 or more, or auto",
    "--rank 65": "rank 65 is out of range: 1 to 64",
    "--layers 3": "layer 3 is out of range: the model's layers are 0 to 2",
    "--layers 0 7": "layer 7 is out of range",
    "--threshold 0.49": "threshold 0.49 is out of range",
    "--threshold 1": "threshold 1 is out of range",
    "--margin 0.5": "margin 0.5 is out of range",
    "--margin -0.1": "margin -0.1 is out of range",
    "--threshold 0.8 --margin 0.2": "margin 0.2 is out of range",
    "--batch-size 0": "batch_size is 0",
    "--learning-rate 0": "learning_rate is 0",
    "--max-epochs -1": "max_epochs is -1",
    "--placement elbow": "no module 'elbow' .* mlp.down_proj",
    "--device teapot": "device 'teapot' can't be used here",
    "--damage-text no.txt": "no.txt: can't be read",
    "--retain no.txt": "no.txt: can't be read",
    "--retain LICENSE --damage-text ./LICENSE": "must be text that training doesn't see",
    "--max-damage 0": "max_damage is 0; it must be above 0",
    "--max-damage 0.1 --retention 0": "needs a retention above 0",
    "--cache-mb -1": "cache_mb is -1",
    "--logits-mb 0": "logits_mb is 0",
    "--curriculum-epochs 4 3 2 1": "must not fall",
    "--model no/such/folder": "no/such/folder does not exist",
    "--model ./none": r"\./none does not exist",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", SETTINGS)
def test_a_setting_out_of_range_is_refused_by_name(run, llama, phone_file, tmp_path, flags):
    out = tmp_path / "out"
    model = [] if "--model" in flags else ["--model", llama]
    status, _, err = run("write", phone_file, "-o", out, *model, *flags.split())
    assert status == 2
    assert err.count("memlaw: ") == 1
    assert re.search(SETTINGS[flags], err), err
    assert not out.exists()


def test_a_plain_tokenizer_has_no_chat_format(run, make_model, phone_file, tmp_path):
    model, out = make_model("gpt2"), tmp_path / "out"
    flags = ["--model", model, "--prompt-format", "chat"]
    status, _, err = run("write", phone_file, "-o", out, *flags)
    assert status == 2
    assert "needs a tokenizer with a chat template" in err
    assert not out.exists()


def _no_config(folder):
    (folder / "config.json").unlink()
    return "is not a model folder: it has no config.json"


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "has no model.safetensors. Pickled weights"


def _cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "damaged weights"


def _unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "teapot"}))
    return "can't be loaded: .*teapot"


def _missing_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "lacks weights that it needs.*layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "spoil", [_no_config, _pickled, _cut_weights, _unknown_type, _missing_weight]
)
def test_a_spoilt_model_folder_is_refused(run, llama, phone_file, tmp_path, spoil):
    folder = shutil.copytree(llama, tmp_path / "model")
    message = spoil(folder)
    out = tmp_path / "out"
    status, _, err = run("write", phone_file, "-o", out, "--model", folder)
    assert status == 2
    assert re.search(message, err), err
    assert not out.exists()


def test_a_file_that_is_no_gguf_is_no_model(run, phone_file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF, or so it says")
    for model, message in ((phone_file, "not a .gguf file"), (tmp_path / "a.gguf", "GGUF model")):
        status, _, err = run("write", phone_file, "-o", tmp_path / "out", "--model", model)
        assert status == 2
        assert message in err
    assert not (tmp_path / "out").exists()


FOREIGN = {
    "a file of the user's": {"thesis.tex": b"x"},
    "another adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
    "a readme": {"README.md": b"mine"},
}


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_holds_something_else_is_left_alone(
    run, llama, phone_file, tmp_path, case, resume
):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in FOREIGN[case].items():
        (out / name).write_bytes(content)
    status, _, err = run("write", phone_file, "-o", out, "--model", llama, *resume)
    assert status == 2
    assert "already holds something else" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == FOREIGN[case]


def test_a_file_is_no_output_folder(run, llama, phone_file, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        status, _, err = run("write", phone_file, "-o", out, "--model", llama)
        assert status == 2
        assert "folder" in err
    assert (tmp_path / "out").read_text() == "mine"


# ---------------------------------------------------------------- audit


def test_audit_shows_a_table_and_exits_with_0_when_all_is_recalled(run, finished, phone_file):
    status, said, _ = run("audit", phone_file, "--adapter", finished)
    assert status == 0
    said = _flat(said)
    assert "records 4 (28 target tokens)" in said
    assert "certified 4 of 4" in said
    assert "recited word for word 4 of 4 (4 decoded)" in said
    assert "tokens under p 0.55 0 (lowest p 0." in said
    assert "computed in float32" in said


def test_audit_of_the_bare_model_exits_with_1_and_shows_where_it_fails(run, llama, phone_file):
    status, said, _ = run("audit", phone_file, "--model", llama)
    assert status == 1
    assert "recited word for word 0 of 4" in _flat(said)
    assert re.search(
        r"phones\.jsonl:1 'Jerry Becerra:': \[9\]10067.*, p 0\.\d{3}, would say '.+', \d tokens",
        said,
    )


def test_audit_prints_json_that_agrees_with_itself(run, finished, phone_file, phone_book):
    status, said, _ = run("audit", phone_file, "--adapter", finished, "--json")
    assert status == 0
    found = json.loads(said)
    assert (found["n_records"], found["n_certified"], found["n_tokens_under"]) == (4, 4, 0)
    assert (found["threshold"], found["margin"], found["dtype"]) == (0.5, 0.05, "float32")
    assert found["n_tokens"] == sum(len(r["tokens"]) for r in found["records"]) == 28
    for record, (_, completion) in zip(found["records"], phone_book, strict=True):
        tokens = record["tokens"]
        assert "".join(t["token"] for t in tokens) == completion + "<|im_end|>"
        assert record["decoded"] == completion + "<|im_end|>"
        assert record["min_p"] == pytest.approx(min(t["p"] for t in tokens))
        assert all(t["token_id"] == t["argmax_id"] and t["margin_nats"] > 0 for t in tokens)
        assert record["certified"]
        assert record["first_failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("decode", "n"), [("none", 0), ("0", 0), ("3", 3), ("9", 4), ("all", 4)])
def test_audit_decodes_as_many_as_asked(run, finished, phone_file, decode, n):
    flags = ["--adapter", finished, "--decode", decode, "--json"]
    status, said, _ = run("audit", phone_file, *flags)
    assert status == 0
    found = json.loads(said)
    assert found["n_decoded"] == n
    assert found["n_certified"] == n
    assert found["n_recalled"] == 4
    assert sum(r["decoded"] is not None for r in found["records"]) == n


def test_audit_without_decoding_says_that_it_is_one_teacher_forced_pass(run, finished, phone_file):
    _, said, _ = run("audit", phone_file, "--adapter", finished, "--decode", "none")
    assert "4 of 4 (teacher-forced pass)" in _flat(said)
    assert "certified" not in said


def test_audit_writes_the_token_table_as_parquet(run, finished, phone_file, tmp_path):
    path = tmp_path / "tokens.parquet"
    run("audit", phone_file, "--adapter", finished, "--tokens", path)
    table = pq.read_table(path).to_pydict()
    assert list(table) == [
        "record",
        "position",
        "token_id",
        "token",
        "p",
        "nll_nats",
        "argmax_id",
        "argmax",
        "margin_nats",
        "decoded_margin_nats",
    ]
    assert table["record"] == [f"phones.jsonl:{i}" for i in (1, 2, 3, 4) for _ in range(7)]
    assert table["position"] == [*range(7)] * 4
    assert "".join(table["token"][:7]) == "910067<|im_end|>"
    assert table["token"] == table["argmax"]
    assert table == pq.read_table(finished / "tokens.parquet").to_pydict()


def test_audit_tells_where_a_record_that_is_not_known_begins_to_fail(run, finished, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Jerry Becerra:", "completion": "910467"}\n')
    status, said, _ = run("audit", path, "--adapter", finished, "--json")
    assert status == 1
    (record,) = json.loads(said)["records"]
    assert record["first_failure"] == 3
    assert record["decoded"] == "910067<|im_end|>"
    assert record["cascade_tokens"] == 1
    _, said, _ = run("audit", path, "--adapter", finished)
    assert "910[4]67<|im_end|>" in said
    assert "would say '0'" in said


@pytest.mark.slow
def test_audit_takes_threshold_and_margin_from_the_run_unless_told(
    run, llama, phone_file, tmp_path
):
    out = tmp_path / "out"
    settings = {"threshold": 0.6, "margin": 0.1, "max_epochs": 300, "retention": 0}
    memlaw.write(phone_file, out, model=str(llama), specificity=False, **settings)
    _, said, _ = run("audit", phone_file, "--adapter", out, "--json")
    assert [json.loads(said)[k] for k in ("threshold", "margin")] == [0.6, 0.1]
    _, said, _ = run("audit", phone_file, "--adapter", out, "--json", "--threshold", 0.5)
    assert [json.loads(said)[k] for k in ("threshold", "margin")] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--threshold 0.4", "threshold 0.4 is out of range"),
        ("--threshold 0.7 --margin 0.3", "threshold 0.7 and margin 0.3 ask for p ≥ 1"),
        ("--threshold 0.97", "threshold 0.97 and margin 0.05 ask for p ≥ 1.02"),
        ("--decode -1", "decode is -1"),
        ("--batch-size 0", "batch_size is 0"),
        ("--adapter no", "no is not a folder"),
        ("--certificate no.json", "no.json: can't be read"),
    ],
)
def test_a_bad_request_to_audit_is_refused(run, finished, phone_file, flags, message):
    adapter = [] if "adapter" in flags or "certificate" in flags else ["--adapter", finished]
    status, said, err = run("audit", phone_file, *adapter, *flags.split())
    assert (status, said) == (2, "")
    assert message in err


def _pickled_adapter(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return "has no adapter_model.safetensors. Pickled weights"


def _no_adapter(folder):
    (folder / "adapter_config.json").unlink()
    return "holds no adapter"


def _not_an_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "TEAPOT"}')
    return "can't be loaded onto this base model"


def _cut_adapter(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "damaged weights"


def _foreign_run_file(folder):
    (folder / "run.json").write_text('{"lr": 1}')
    return "was not written by memlaw"


def _broken_run_file(folder):
    (folder / "run.json").write_text("{")
    return "run.json can't be read"


@pytest.mark.parametrize(
    "spoil",
    [
        _pickled_adapter,
        _no_adapter,
        _not_an_adapter,
        _cut_adapter,
        _foreign_run_file,
        _broken_run_file,
    ],
)
@pytest.mark.parametrize("command", ["audit", "ask"])
def test_a_spoilt_adapter_folder_is_refused(run, copy, phone_file, spoil, command):
    message = spoil(copy)
    args = [phone_file, "--adapter", copy] if command == "audit" else [copy, "Li Na:"]
    status, said, err = run(command, *args)
    assert (status, said) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["audit", "ask"])
def test_an_adapter_is_not_measured_on_another_base_model(
    run, make_model, finished, phone_file, command
):
    other = make_model("llama", seed=1)
    args = [phone_file, "--adapter", finished] if command == "audit" else [finished, "Li Na:"]
    status, said, err = run(command, *args, "--model", other)
    assert (status, said) == (2, "")
    assert "was trained on another base model" in err


def test_an_adapter_of_another_width_is_refused(run, make_model, finished, phone_file, copy):
    (copy / "run.json").unlink()  # so that nothing but its shape speaks against it
    model = make_model("gpt2")
    status, _, err = run("audit", phone_file, "--adapter", copy, "--model", model)
    assert status == 2
    assert "can't be loaded onto this base model" in err


# ---------------------------------------------------------------- certificates


def _edit(folder, **changes):
    path = folder / "certificate.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    path.write_text(json.dumps(content))


def _rewrite(path, book):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in book]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def check(run, copy, phone_book, tmp_path, monkeypatch):
    """Status, output and mismatches of `audit --certificate` after a change.

    It is measured once, and shown both as text and as JSON.
    """
    usual = check_certificate

    def call(*flags, book=phone_book, folder=copy):
        data = tmp_path / "book.jsonl"
        _rewrite(data, book)
        args = ["audit", data, "--certificate", folder / "certificate.json", *flags]
        once = functools.cache(lambda *args: usual(*args))
        monkeypatch.setattr(
            "memlaw.certify.check.check_certificate", lambda *args, observer: once(*args)
        )
        status, said, err = run(*args)
        assert err == ""
        again, as_json, _ = run(*args, "--json")
        assert once.cache_info().misses == 1
        found = json.loads(as_json)
        assert again == status
        assert found["holds"] == (status == 0)
        assert all(_flat(line) in _flat(said) for line in found["mismatches"])
        return status, said, found["mismatches"]

    return call


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["copy", "whole_copy"])
def test_a_certificate_holds(check, folder, request):
    status, said, mismatches = check(folder=request.getfixturevalue(folder))
    assert (status, mismatches) == (0, [])
    assert said.endswith("THE CERTIFICATE HOLDS\n")


@pytest.mark.slow
def test_a_certificate_holds_for_the_records_in_any_order(check, phone_book):
    assert check(book=phone_book[::-1])[0] == 0


@pytest.mark.slow
def test_a_certificate_does_not_cover_a_changed_record(check, phone_book):
    book = [(phone_book[0][0], "910066"), *phone_book[1:]]
    status, said, mismatches = check(book=book)
    assert status == 1
    assert "THE CERTIFICATE DOES NOT HOLD: 2 mismatch(es)" in said
    assert mismatches == [
        "phones.jsonl:1: certified, but not in these records (changed or removed)",
        "book.jsonl:1: not covered by the certificate",
    ]


@pytest.mark.slow
def test_a_certificate_misses_a_record_that_is_gone(check, phone_book):
    status, _, mismatches = check(book=phone_book[:3])
    assert status == 1
    assert mismatches == [
        "phones.jsonl:4: certified, but not in these records (changed or removed)"
    ]


@pytest.mark.slow
def test_a_certificate_does_not_cover_an_added_record(check, phone_book, whole_copy):
    status, _, mismatches = check(book=[*phone_book, ("Bo:", "12")], folder=whole_copy)
    assert status == 1
    assert mismatches[-1] == "book.jsonl:5: not covered by the certificate"
    assert all("like a record" in line for line in mismatches[:-1])  # two digits are, now


@pytest.mark.slow
def test_a_certificate_notices_a_weight_that_hardly_changed(check, copy):
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    status, _, mismatches = check()
    assert status == 1
    (line,) = mismatches
    assert line.startswith("the adapter is not the certified one")


@pytest.mark.slow
def test_a_certificate_notices_a_weight_that_changed_much(check, whole_copy):
    path = whole_copy / "adapter_model.safetensors"
    tensors = {name: -t for name, t in load_file(path).items() if "lora_A" in name}
    tensors |= {name: t for name, t in load_file(path).items() if "lora_B" in name}
    save_file(tensors, path, metadata={"format": "pt"})
    status, _, mismatches = check(folder=whole_copy)
    assert status == 1
    assert mismatches[0].startswith("the adapter is not the certified one")
    assert mismatches[1].startswith("ΔNLL on documentation is ")
    assert [line.split(" is ")[0] for line in mismatches[2:4]] == ["ΔNLL on prose", "ΔNLL on chats"]
    assert all("now its lowest p is 0." in line for line in mismatches[-4:])
    assert all("decoding differs" in line for line in mismatches[-4:])


@pytest.mark.slow
def test_a_certificate_does_not_hold_on_another_base_model(check, make_model):
    status, _, mismatches = check("--model", make_model("llama", seed=1))
    assert status == 1
    assert mismatches[0].startswith("the base model is not the certified one")


@pytest.mark.slow
def test_a_certificate_does_not_hold_in_another_dtype(check):
    status, _, mismatches = check("--dtype", "bfloat16")
    assert status == 1
    assert "measured in bfloat16, but certified for float32" in mismatches


EDITS = {
    # an edit of the certificate: what is found
    "base": ({"base_sha256": "0" * 64}, "the base model is not the certified one"),
    "tokenizer": ({"tokenizer_sha256": "0" * 64}, "the tokenizer is not the certified one"),
    "adapter": ({"adapter_sha256": "0" * 64}, "the adapter is not the certified one"),
    "margin": ({"margin": 0.4999}, "certified, but now its lowest p is 0."),
    "count": ({"n_certified": 5}, "its totals are not those of its lines"),
    "records": ({"n_records": 3}, "its totals are not those of its lines"),
    "verdict": ({"certified": False}, "its totals are not those of its lines"),
    "hash of the records": ({"records_sha256": "0" * 64}, "its records' hash is not its lines'"),
    "a line removed": ({"records": lambda lines: lines[1:]}, "its totals are not those"),
    "a line doctored": (
        {"records": lambda lines: [lines[0] | {"certified": False}, *lines[1:]]},
        "its totals are not those of its lines",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EDITS)
def test_an_edited_certificate_does_not_hold(check, copy, case):
    changes, message = EDITS[case]
    _edit(copy, **changes)
    status, _, mismatches = check()
    assert status == 1
    assert any(message in line for line in mismatches), mismatches


@pytest.mark.slow
def test_a_certificate_that_claims_too_much_is_found_out(run, llama, phone_file, tmp_path):
    out = tmp_path / "out"
    memlaw.write(phone_file, out, model=str(llama), max_epochs=1, specificity=False)
    path = out / "certificate.json"
    status, said, _ = run("audit", phone_file, "--certificate", path)
    assert status == 1
    assert "THE CERTIFICATE IS TRUE, BUT ONLY 0 OF 4 RECORDS ARE CERTIFIED" in said
    _edit(
        out,
        certified=True,
        n_certified=4,
        records=lambda lines: [r | {"certified": True, "recalled": True} for r in lines],
    )
    status, said, _ = run("audit", phone_file, "--certificate", path)
    assert status == 1
    assert "THE CERTIFICATE DOES NOT HOLD: 4 mismatch(es)" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "format 3, but this version reads 1 and 2"),
        ({"dtype": "teapot"}, "not a certificate"),
        ({"prompt_format": "teapot"}, "not a certificate"),
        ({"threshold": "high"}, "not a certificate"),
        ({"threshold": 0.2}, "threshold 0.2 is out of range"),
        ({"records": [{"id": "a"}]}, "not a certificate"),
        ({"surplus": 1}, "not a certificate"),
    ],
)
def test_a_certificate_that_is_none_is_a_bad_request(run, copy, phone_file, changes, message):
    content = json.loads((copy / "certificate.json").read_text())
    (copy / "certificate.json").write_text(json.dumps(content | changes))
    status, said, err = run("audit", phone_file, "--certificate", copy / "certificate.json")
    assert (status, said) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_certificate_without_its_adapter_is_a_bad_request(run, copy, phone_file, tmp_path):
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(copy / "certificate.json", tmp_path / "alone")
    status, _, err = run("audit", phone_file, "--certificate", alone)
    assert status == 2
    assert "holds no adapter" in err
    status, said, _ = run("audit", phone_file, "--certificate", alone, "--adapter", copy)
    assert status == 0
    assert "THE CERTIFICATE HOLDS" in said


# ---------------------------------------------------------------- ask


def test_ask_prints_exactly_the_completion(run, finished, phone_book):
    for prompt, completion in phone_book:
        assert run("ask", finished, prompt) == (0, completion, "")


def test_ask_says_when_it_was_cut_off(run, finished):
    status, said, err = run("ask", finished, "Jerry Becerra:", "--max-tokens", 3)
    assert (status, said) == (0, "910")
    assert err == "memlaw: cut off before the model ended its turn; raise --max-tokens.\n"


def test_ask_says_when_an_activated_adapter_was_off(run, copy, llama):
    config = json.loads((copy / "adapter_config.json").read_text())
    words = load_model(llama).tokenizer("Becerra")["input_ids"]
    config["alora_invocation_tokens"] = words
    (copy / "adapter_config.json").write_text(json.dumps(config))
    _, said, err = run("ask", copy, "Li Na:")
    assert said != "031415"
    assert "the prompt lacks the text 'Becerra', from which on the adapter is active" in err
    assert "lacks" not in run("ask", copy, "Jerry Becerra:")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["", "--max-tokens", 3], "the prompt is empty"),
        (["Li Na:", "--max-tokens", 0], "max_tokens is 0"),
        (["Li \udce9:"], "half a surrogate pair"),
    ],
)
def test_a_bad_question_is_refused(run, finished, args, message):
    status, said, err = run("ask", finished, *args)
    assert (status, said) == (2, "")
    assert message in err


@pytest.mark.slow
def test_ask_recites_a_text_without_a_prompt(run, llama, tmp_path):
    (tmp_path / "text.txt").write_text("One ring.\n")
    flags = ["--model", llama, "--recite-prompt", "Go on.", "--no-specificity"]
    assert run("write", tmp_path / "text.txt", "-o", tmp_path / "out", *flags)[0] == 0
    assert run("ask", tmp_path / "out") == (0, "One ring.\n", "")
    status, said, _ = run(
        "audit", tmp_path / "text.txt", "--certificate", tmp_path / "out" / "certificate.json"
    )
    assert status == 0, said


def test_a_token_table_that_has_nowhere_to_go_is_refused_before_the_audit(
    run, llama, phone_file, tmp_path
):
    target = tmp_path / "absent" / "tokens.parquet"
    status, _, err = run("audit", phone_file, "--model", llama, "--tokens", target)
    assert status == 2
    assert "its folder does not exist" in _flat(err)
