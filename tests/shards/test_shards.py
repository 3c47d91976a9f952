"""Records spread over adapters: each written as `write` does, all certified, and found again."""

import json
import shutil

import pytest

import memlaw
from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.observer import Observer
from memlaw.data.reading import read_records
from memlaw.model.peft_folder import PEFT_WEIGHTS
from memlaw.shards import writing
from memlaw.shards.spreading import place, spread


def _weights(out):
    return {
        path.parent.name: path.read_bytes() for path in sorted(out.glob(f"shards/*/{PEFT_WEIGHTS}"))
    }


def _records(n, size=1):
    return read_records([(f"who is {i}?", "x" * size) for i in range(n)])


def test_shards_are_filled_alike_and_no_record_is_lost():
    for n, shards in ((7, 3), (5, 5), (401, "auto")):
        records = _records(n)
        parts = spread(records, shards)
        assert [r for part in parts.values() for r in part] == records
        sizes = [len(part) for part in parts.values()]
        assert len(sizes) == 3 if shards == "auto" else shards
        assert max(sizes) - min(sizes) <= 1
    assert len(spread(_records(200), "auto")) == 1
    assert len(spread(_records(10, size=10_000), "auto")) == 4
    for shards in (0, 6):
        with pytest.raises(ConfigError, match="shards for 5"):
            spread(_records(5), shards)


def test_added_records_go_where_there_is_room():
    there = {"shard-0001": _records(200), "shard-0002": _records(150), "shard-0007": []}
    added = read_records([(f"new {i}?", "y") for i in range(60)])
    found = place(there, added, "auto")
    assert {name: len(part) for name, part in found.items()} == {"shard-0002": 50, "shard-0008": 10}
    assert {*place(there, added[:1], 2)} == {"shard-0002"}


def test_all_are_certified_and_each_shard_is_a_folder_of_write(written, book):
    check = memlaw.check_shards(written, book)
    assert check.holds
    assert check.certificate.n_records == check.n_recalled == 6
    assert list(check.certificate.adapters) == ["shard-0001", "shard-0002", "shard-0003"]
    one = written / "shards" / "shard-0002"
    assert memlaw.check_certificate(one / "certificate.json", book[2:4]).holds
    assert not (written / writing.PLAN_FILE).exists()


def test_what_is_claimed_of_all_is_what_the_worst_does(written):
    whole = json.loads((written / "certificate.json").read_text())
    parts = [json.loads(p.read_text()) for p in written.glob("shards/*/certificate.json")]
    for name in ("delta_nll_nats", "kl_nats"):
        assert whole["damage"][name] == max(part["damage"][name] for part in parts)
    for end in (0, 1):
        highest = max(part["damage"]["delta_nll_ci95"][end] for part in parts)
        assert whole["damage"]["delta_nll_ci95"][end] == highest
    assert whole["n_parameters"] == sum(part["n_parameters"] for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "total", "harm", "shard"])
def test_a_certificate_over_all_that_was_tampered_with_does_not_hold(folder, book, what):
    path = folder / "certificate.json"
    content = json.loads(path.read_text())
    if what == "adapter":
        content["adapters"]["shard-0001"] = "0" * 64
    elif what == "total":
        content["n_parameters"] += 1
    elif what == "harm":
        content["damage"]["delta_nll_nats"] -= 1e-6
    else:
        shutil.rmtree(folder / "shards" / "shard-0001")
    path.write_text(json.dumps(content))
    check = memlaw.check_shards(folder, book)
    assert not check.holds
    assert check.mismatches


def test_other_records_are_not_the_certified_ones(written, book):
    changed = memlaw.check_shards(written, [*book[:-1], (book[-1][0], "999999")])
    assert not changed.holds
    assert any("changed or removed" in said for said in changed.mismatches)
    more = memlaw.check_shards(written, [*book, ("Di Fa:", "1")])
    assert any("not covered" in said for said in more.mismatches)


def test_public_files_hold_no_text_and_no_hash_that_a_guess_could_be_tried_by(written, book):
    from memlaw.shards.layout import prompt_sha256

    records = read_records(book)
    secrets = {text for pair in book for text in pair}
    secrets |= {r.sha256 for r in records} | {prompt_sha256(r.prompt) for r in records}
    for name in ("index.json", "certificate.json", "README.md", "run.json"):
        text = (written / name).read_text()
        assert not [secret for secret in secrets if secret in text], name
    assert (written / "private").stat().st_mode & 0o777 == 0o700
    for path in (written / "private").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


class _Stops(Observer):
    """Interrupts when a shard is begun."""

    def __init__(self, name):
        self.name = name

    def notice(self, text):
        if text.startswith(f"{self.name}:"):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_shards_that_are_missing(
    written, book, settings, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        memlaw.write_shards(book, out, shards=3, observer=_Stops("shard-0003"), **settings)
    assert len(_weights(out)) == 2
    with pytest.raises(OutputError, match="--resume"):
        memlaw.write_shards(book, out, shards=3, **settings)
    with pytest.raises(ConfigError, match="other records in its shards"):
        memlaw.write_shards(book[1:], out, shards=3, resume=True, **settings)
    with pytest.raises(ConfigError, match="other settings"):
        memlaw.write_shards(book, out, shards=3, resume=True, **settings, margin=0.1)
    trained = []
    usual = writing.write_records
    monkeypatch.setattr(
        writing, "write_records", lambda *a, **k: trained.append(a[1].name) or usual(*a, **k)
    )
    (out / "shards" / "shard-0003").mkdir()  # as one that was killed at its very end
    (out / "shards" / "shard-0003" / PEFT_WEIGHTS).write_bytes(b"half")
    assert memlaw.write_shards(book, out, shards=3, resume=True, **settings).succeeded
    assert trained == ["shard-0003"]
    assert _weights(out) == _weights(written)
    with pytest.raises(OutputError, match="already holds"):
        memlaw.write_shards(book, out, shards=3, **settings)


@pytest.mark.slow
def test_a_shard_that_is_not_certified_makes_the_whole_not_certified(book, settings, tmp_path):
    few = {**settings, "max_epochs": 1}
    result = memlaw.write_shards(book[:2], tmp_path / "out", shards=2, **few)
    assert not result.certified
    assert not result.succeeded
    more = {**settings, "resume": True}
    assert memlaw.write_shards(book[:2], tmp_path / "out", shards=2, **more).succeeded


@pytest.mark.slow
def test_another_tokenizer_goes_with_the_shards(settings, make_tokenizer, tmp_path):
    words, out = make_tokenizer("chat"), tmp_path / "out"
    words.chat_template = "{{ mode }} book.\n" + words.chat_template
    words.save_pretrained(tmp_path / "words")
    settings = settings | {"tokenizer": str(tmp_path / "words")}
    rows = [
        {"prompt": prompt, "completion": completion, "chat_template_kwargs": {"mode": "Phone"}}
        for prompt, completion in (("Li Na:", "0314"), ("Bo Ek:", "2718"))
    ]
    result = memlaw.write_shards(rows, out, shards=2, **settings)
    assert result.succeeded
    assert f"{tmp_path / 'words'}, not the base model's" in result.certificate.statement
    (tmp_path / "words").rename(tmp_path / "gone")

    assert memlaw.check_shards(out, rows).holds
    answer = memlaw.ask(out, "Bo Ek:")
    assert (answer.text, answer.adapter, answer.likeness) == ("2718", "shard-0002", None)
    loaded = memlaw.load(out)
    prompts = [record.prompt for record in memlaw.read_records(rows)]
    assert loaded.generate(prompts) == ["0314", "2718"]
    loaded.router.index.records.clear()  # so that it goes by what was kept of these prompts
    assert loaded.route(prompts[1]).likeness == pytest.approx(1, abs=1e-3)

    rows[1]["completion"] = "99"
    assert memlaw.update_shards(out, rows).taken
    assert memlaw.check_shards(out, rows).holds
    assert (out / "tokenizer.json").is_file()


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(written, book, settings, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    launcher = writing.ray_launcher(cpus=1)
    out = tmp_path / "out"
    assert memlaw.write_shards(book, out, shards=3, launcher=launcher, **settings).succeeded
    assert _weights(out) == _weights(written)


@pytest.mark.slow
def test_further_phrasings_of_records_in_several_shards_are_checked(book, settings, tmp_path):
    data = tmp_path / "phrasings.jsonl"
    rows = [{"prompt": p, "paraphrases": [f"Number of {p}", f"And {p}"]} for p, _ in book]
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    how = {**settings, "paraphrases": str(data)}
    assert memlaw.write_shards(book, out, shards=2, **how).succeeded
    check = memlaw.check_shards(out, book)
    assert check.holds, (check.mismatches, check.unchecked)
    assert check.certificate.harms["generality"]["n"] == len(book)


@pytest.mark.slow
def test_rows_that_are_left_out_are_listed(book, settings, tmp_path):
    out, data = tmp_path / "out", [*book[:2], ("Eve Mora:", "12<|im_end|>3")]
    assert memlaw.write_shards(data, out, shards=2, skip_bad=True, **settings).succeeded
    (line,) = (out / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"]
    assert memlaw.update_shards(out, data).changes.nothing
