"""A folder of shards in step with its data: only what changes is trained, all or nothing."""

import json
import shutil

import pytest

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import AdapterError, ConfigError, MemlawError, OutputError
from memlaw.core.observer import Observer
from memlaw.model.peft_folder import PEFT_WEIGHTS
from memlaw.writer.folder import whole_of


def _weights(out):
    return {
        path.parent.name: path.read_bytes() for path in sorted(out.glob(f"shards/*/{PEFT_WEIGHTS}"))
    }


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_only_shards_with_a_change_are_trained_and_it_can_be_undone(folder, book):
    before, files = _weights(folder), _files(folder)
    data = [(book[0][0], "555555"), *book[1:]]
    result = memlaw.update_shards(folder, data)
    assert result.taken
    assert result.trained == ("shard-0001",)
    after = _weights(folder)
    assert {name for name in before if before[name] != after[name]} == {"shard-0001"}
    assert memlaw.check_shards(folder, data).holds
    assert memlaw.ask(folder, book[0][0]).text == "555555"
    assert memlaw.diff(folder, data).nothing
    assert [line["replaced"] for line in memlaw.log(folder)] == [0, 1]
    assert _files(folder / "generations" / "1") == files
    memlaw.revert(folder, to=1)
    assert _weights(folder) == before
    assert memlaw.check_shards(folder, book).holds


def _timings(folder):
    return json.loads((folder / "run.json").read_text())["timings"]


def test_an_update_is_foretold_by_the_shards_that_change(folder, book):
    def each(name):
        run = _timings(folder / "shards" / name)
        return run["wall_s"] - run["once_s"] - run["training_s"], run["training_s"]

    (rest_1, trained_1), (rest_3, trained_3) = map(each, ("shard-0001", "shard-0003"))
    joining = _timings(folder)["joining_s"]
    assert joining > 0
    of_shards = [_timings(path)["once_s"] for path in (folder / "shards").iterdir()]
    assert _timings(folder)["once_s"] >= sum(of_shards)
    changed = [(book[0][0], "555555"), *book[1:]]  # of two records one
    assert memlaw.diff(folder, changed).cost_s == pytest.approx(joining + rest_1 + trained_1)
    changed[-1] = (book[-1][0], "777")
    both = joining + rest_1 + trained_1 + rest_3 + trained_3
    assert memlaw.diff(folder, changed).cost_s == pytest.approx(both)
    more = [*book, ("Di Fa:", "141421")]  # three records for two in the shard that it goes to
    assert memlaw.diff(folder, more).cost_s == pytest.approx(joining + rest_1 + 1.5 * trained_1)
    assert memlaw.diff(folder, book).cost_s == 0
    assert memlaw.diff(folder, book[:4]).cost_s == pytest.approx(joining)  # a whole shard goes


@pytest.mark.parametrize("missing", ["index.json", "shards/shard-0001/run.json"])
def test_what_is_not_whole_can_be_compared_and_foretells_nothing(folder, book, missing):
    (folder / missing).unlink()
    found = memlaw.diff(folder, [(book[0][0], "555555"), *book[1:]])
    assert found.counts["replaced"] == 1
    assert found.cost_s is None
    assert memlaw.diff(folder, book).cost_s == 0
    with pytest.raises(MemlawError):
        memlaw.update_shards(folder, [(book[0][0], "555555"), *book[1:]])


def test_what_a_killed_exchange_left_aside_is_found_by_the_command(folder, book, capsys):
    data = folder.parent / "book.jsonl"
    rows = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in book]
    data.write_text("\n".join(rows))
    folder.rename(folder.parent / f".{folder.name}.last")
    assert run(["update", str(folder), str(data)]) == 0
    assert "NO CHANGE" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["out"]


def test_a_shard_is_not_changed_by_itself(folder, book):
    shard, before = folder / "shards" / "shard-0001", _files(folder)
    said = []
    observer = Observer()
    observer.notice = said.append
    assert memlaw.diff(shard, book, observer=observer).counts["added"] == 4
    assert "is a shard of" in said[0]
    with pytest.raises(OutputError, match="is a shard of"):
        memlaw.update(shard, book)
    with pytest.raises(OutputError, match="is a shard of"):
        memlaw.revert(shard, to=1)
    assert _files(folder) == before


def test_a_folder_that_only_lies_like_a_shard_is_none(written, book, tmp_path):
    """Somebody's own folder of that name, in a folder with an index."""
    mine = tmp_path / "shards" / "shard-0001"
    shutil.copytree(written / "shards" / "shard-0001", mine)
    (tmp_path / "index.json").write_text("{}")
    assert whole_of(mine) is None
    assert memlaw.update(mine, book[:2]).changes.nothing
    assert whole_of(written / "shards" / "shard-0001") == written.resolve()


def test_another_shard_than_the_certified_one_is_told(folder, book):
    path = folder / "shards" / "shard-0001" / "certificate.json"
    path.write_text(path.read_text().replace('"adapter_sha256": "', '"adapter_sha256": "0'))
    with pytest.raises(AdapterError, match="shard-0001: the adapter is not the certified one"):
        memlaw.diff(folder, book)
    with pytest.raises(AdapterError, match="isn't what it was certified as"):
        memlaw.update_shards(folder, book[1:])


def test_a_shard_that_does_not_know_its_records_forgets_none(folder, book):
    """It would be taken as done, though nothing had been looked for."""
    (folder / "shards" / "shard-0001" / "private" / "records.jsonl").unlink()
    before = _files(folder)
    with pytest.raises(ConfigError, match=r"shard-0001 aren't in the data.*--forget rewrite"):
        memlaw.update_shards(folder, book[1:])
    assert _files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_what_is_removed_is_forgotten_and_an_empty_shard_is_dropped(folder, book):
    data = [book[0], *book[1:4]]  # the third shard's are gone
    result = memlaw.update_shards(folder, [*data, ("Di Fa:", "141421")])
    assert result.taken
    assert result.dropped == ("shard-0003",)
    assert not (folder / "shards" / "shard-0003").exists()
    assert not (folder / "generations").exists()
    assert memlaw.check_shards(folder, [*data, ("Di Fa:", "141421")]).holds
    gone = {text for pair in book[4:] for text in pair}
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md"):
            assert not [text for text in gone if text in path.read_text()], path


def test_no_change_does_nothing_and_what_is_not_good_enough_is_refused(folder, book):
    before = _files(folder)
    assert memlaw.update_shards(folder, book[::-1]).changes.nothing
    refused = memlaw.update_shards(folder, [*book[:-1], (book[-1][0], "9999")], max_epochs=1)
    assert not refused.taken
    assert refused.trained == ("shard-0003",)
    assert _files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_the_update_of_one_adapter_is_not_for_shards(folder, book):
    before = _files(folder)
    with pytest.raises(OutputError, match="update_shards"):
        memlaw.update(folder, book[1:], forget="rewrite")
    (folder / "private" / "records.jsonl").unlink()
    with pytest.raises(OutputError, match="no private records"):
        memlaw.update_shards(folder, book[1:])
    assert len(_files(folder)) == len(before) - 1


@pytest.mark.slow
def test_a_shard_that_is_not_certified_must_be_finished_first(book, settings, tmp_path):
    out = tmp_path / "out"
    assert not memlaw.write_shards(book, out, shards=3, **settings | {"max_epochs": 1}).certified
    data = [*book[:-1], (book[-1][0], "9999")]
    with pytest.raises(OutputError, match=r"shard-0001 isn't certified .*--resume"):
        memlaw.update_shards(out, data, max_epochs=300)
    assert memlaw.write_shards(book, out, shards=3, **settings | {"resume": True}).succeeded
    assert memlaw.update_shards(out, data).taken


NOTES = (
    *("notes.txt", "shards/notes.txt", "shards/shard-0001.bak/notes.txt"),
    *(f"shards/shard-000{n}/notes.txt" for n in (1, 2, 3)),
)


@pytest.mark.slow
def test_notes_in_a_folder_of_shards_stay(folder, book):
    (folder / "shards/shard-0001.bak").mkdir()
    for name in NOTES:
        (folder / name).write_text("mine")
    assert memlaw.update_shards(folder, [(book[0][0], "555555"), *book[1:]]).taken
    assert all((folder / name).read_text() == "mine" for name in NOTES)
    assert not list((folder / "generations").rglob("notes.txt"))
    dropped = memlaw.update_shards(folder, [(book[0][0], "555555"), *book[1:4]], forget="rewrite")
    assert dropped.taken
    assert dropped.dropped == ("shard-0003",)
    assert all((folder / name).read_text() == "mine" for name in NOTES)


def test_a_certificate_as_earlier_versions_joined_it_is_joined_anew(folder, book, capsys):
    """One adapter's claim, where now each figure is the worst of all."""
    path = folder / "certificate.json"
    content = json.loads(path.read_text())
    parts = [json.loads(p.read_text()) for p in sorted(folder.glob("shards/*/certificate.json"))]
    content["damage"] = max((p["damage"] for p in parts), key=lambda d: d["delta_nll_ci95"][1])
    content["damage"]["kl_nats"] = min(p["damage"]["kl_nats"] for p in parts)
    path.write_text(json.dumps(content))
    before = _weights(folder)
    (said,) = memlaw.check_shards(folder, book).mismatches
    assert "memlaw update joins them anew" in said
    data = folder.parent / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in book))
    assert run(["update", str(folder), str(data)]) == 0
    assert "joined anew" in capsys.readouterr().out
    assert len(memlaw.log(folder)) == 2
    assert _weights(folder) == before
    assert memlaw.check_shards(folder, book).holds
    assert memlaw.update_shards(folder, book).changes.nothing


def test_notes_in_shards_stay_when_it_is_gone_back(folder, book):
    notes = folder / "shards/shard-0001/notes.txt"
    notes.write_text("one")
    (folder / ".gitignore").write_text("everything\n")
    assert memlaw.update_shards(folder, [(book[0][0], "555555"), *book[1:]]).taken
    assert not list((folder / "generations").rglob("notes.txt"))
    notes.write_text("two")
    memlaw.revert(folder, to=1)
    assert notes.read_text() == "two"
    assert (folder / ".gitignore").read_text() == "everything\n"
