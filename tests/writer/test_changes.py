"""What must change: told by identity, and said where it can't be told."""

import json
import shutil

import pytest

import memlaw
from memlaw import cli
from memlaw.certify.certificate import CertifiedRecord
from memlaw.core.commitment import OPENINGS_FILE, commitment, read_key
from memlaw.core.errors import AdapterError, DataError, OutputError
from memlaw.data.reading import read_records
from memlaw.writer.changes import Changes, cost_s


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    """One epoch is enough to know what a folder is to say."""
    out = tmp_path_factory.mktemp("written") / "out"
    settings = {"specificity": False, "retention": 0, "max_epochs": 1, **texts}
    memlaw.write(phone_book, out, model=str(llama), **settings)
    return out


@pytest.fixture
def forgetful(written, tmp_path):
    """The same without its private records."""
    out = tmp_path / "forgetful"
    shutil.copytree(written, out)
    (out / "private" / "records.jsonl").unlink()
    return out


NEW = [
    ("Ann Oyelaran:", "447020"),
    ("Jerry Becerra:", "111111"),
    ("Bo:", "22"),
    ("Zoë Müller:", "918273"),
]


def test_each_record_is_added_replaced_removed_or_unchanged(written):
    found = memlaw.diff(written, NEW)
    assert [r.prompt for r in found.added] == ["Bo:"]
    assert [(old.completion, new.completion) for old, new in found.replaced] == [
        ("910067", "111111")
    ]
    assert [r.prompt for r in found.removed] == ["Li Na:"]
    assert {r.prompt for r in found.unchanged} == {"Ann Oyelaran:", "Zoë Müller:"}
    assert not found.nothing
    assert found.cost_s > 0


def test_the_order_of_records_is_no_change(written, phone_book):
    found = memlaw.diff(written, phone_book[::-1])
    assert found.nothing
    assert found.counts == {"added": 0, "replaced": 0, "removed": 0, "unchanged": 4}
    assert found.cost_s == 0


def test_a_prompt_in_messages_is_not_told_from_its_text(written, phone_book):
    """It would be forgotten and learnt at once."""

    def chat(*said):
        roles = ("user", "assistant", "user", "assistant")
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]}

    with pytest.raises(DataError, match=r"1 prompt.s. are as text in the folder and in messages"):
        memlaw.diff(written, [chat("Li Na:", "031415"), phone_book[0]])
    found = memlaw.diff(written, [chat("Li Na:", "?", "Li Na:", "031415")])
    assert found.counts == {"added": 1, "replaced": 0, "removed": 4, "unchanged": 0}


@pytest.mark.parametrize("row", ['{"prompt": "Eve Mora:", "completion": 555123}', '{"prompt": "E'])
def test_a_row_that_cannot_be_used_is_no_record_that_is_gone(
    written, phone_book, tmp_path, row, capsys
):
    good = [json.dumps({"prompt": p, "completion": c}) for p, c in phone_book]
    data = tmp_path / "data.jsonl"
    for rows in ([*good, row], [*good[:-1], row]):
        data.write_text("\n".join(rows))
        for command in ("diff", "update"):
            assert cli.run([command, str(written), str(data)]) == 2
            assert "data.jsonl:" in capsys.readouterr().err
            if command == "diff" or rows[:-1] == good:  # else there is something to train
                assert cli.run([command, str(written), str(data), "--skip-bad"]) == 0
                assert "1 bad row(s) left out" in capsys.readouterr().err


def test_data_that_contradict_themselves_are_refused(written):
    with pytest.raises(DataError, match="different completions"):
        memlaw.diff(written, [("a", "b"), ("a", "c")])


def test_another_base_model_is_refused(written, make_model):
    with pytest.raises(AdapterError, match="another base model"):
        memlaw.diff(written, NEW, model=str(make_model("llama", seed=1)))


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no finished run"):
        memlaw.diff(tmp_path, NEW)


def test_without_private_records_hashes_tell_what_they_can(forgetful, phone_book):
    assert memlaw.diff(forgetful, phone_book).nothing
    found = memlaw.diff(forgetful, NEW)
    assert {r.prompt for r in found.added} == {"Bo:", "Jerry Becerra:"}
    assert (found.replaced, found.removed) == ((), ())
    assert found.counts["lost"] == 2
    key = read_key(forgetful)
    here = {commitment(key, record.sha256) for record in found.unchanged}
    lines = json.loads((forgetful / "certificate.json").read_text())["records"]
    assert [line.name for line in found.lost] == [
        line["commitment"] for line in lines if line["commitment"] not in here
    ]


def test_without_private_records_and_key_nothing_can_be_told(forgetful):
    (forgetful / OPENINGS_FILE).unlink()
    with pytest.raises(OutputError, match="neither its private records nor the key"):
        memlaw.diff(forgetful, NEW)


def test_private_records_of_another_folder_are_refused(forgetful):
    (forgetful / "private" / "records.jsonl").write_text(
        json.dumps({"id": "x", "prompt": "a", "completion": "b"}) + "\n"
    )
    with pytest.raises(OutputError, match=r"not those of its certificate.*Remove"):
        memlaw.diff(forgetful, NEW)


def _jsonl(path, book):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in book))
    return str(path)


def test_the_command_shows_counts_and_the_first_of_each(written, tmp_path, capsys):
    assert cli.run(["diff", str(written), _jsonl(tmp_path / "new.jsonl", NEW)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for line in (
        "+ 'Bo:' -> '22'",
        "~ 'Jerry Becerra:' -> '111111' (was '910067')",
        "- 'Li Na:'",
        "drops the generations before",
    ):
        assert line in said
    assert "unchanged 2" in said


def test_the_command_says_that_nothing_changes(written, phone_book, tmp_path, capsys):
    assert cli.run(["diff", str(written), _jsonl(tmp_path / "same.jsonl", phone_book)]) == 0
    assert "NO CHANGE" in capsys.readouterr().out


def test_json_has_every_record_that_changes(written, tmp_path, capsys):
    assert cli.run(["diff", str(written), _jsonl(tmp_path / "new.jsonl", NEW), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"added": 1, "replaced": 1, "removed": 1, "unchanged": 2}
    assert found["replaced"][0]["was"] == "910067"
    assert found["removed"][0]["prompt"] == "Li Na:"


def test_the_command_says_what_private_records_are_for(forgetful, tmp_path, capsys):
    assert cli.run(["diff", str(forgetful), _jsonl(tmp_path / "new.jsonl", NEW)]) == 0
    said = capsys.readouterr()
    assert "has no private records" in " ".join(said.err.split())
    assert "lost" in said.out


def _changes(n_added, n_removed, n_unchanged):
    records = tuple(read_records([(f"P{i}:", str(i)) for i in range(200)]))
    return Changes(
        added=records[:n_added],
        removed=records[n_added : n_added + n_removed],
        unchanged=records[-n_unchanged:],
    )


@pytest.mark.parametrize(
    ("n_added", "n_removed", "n_unchanged", "is_much"),
    [
        (10, 0, 90, False),
        (11, 0, 89, True),
        (5, 6, 95, True),
        (5, 5, 95, False),
        (40, 0, 40, False),  # of few, what each costs is little beside all else
    ],
)
def test_more_than_a_tenth_of_many_is_much(n_added, n_removed, n_unchanged, is_much):
    assert _changes(n_added, n_removed, n_unchanged).is_much == is_much


def _run(**timings):
    return {"timings": {"wall_s": 300.0, "training_s": 200.0, **timings}, "records": {"n": 100}}


def test_much_costs_what_all_cost():
    assert cost_s(_run(), _changes(10, 0, 90), 100) == 100 + 20
    generations = [{"anew": True, "training_s": 400.0, "records": 100}, {"anew": False}]
    run = _run() | {"generations": generations}
    assert cost_s(run, _changes(50, 0, 50), 100) == 100 + 400
    assert cost_s(run, _changes(10, 0, 90), 100) == 100 + 40  # not what the last change took
    generations.append({**generations[0], "training_s": None})  # a revert
    assert cost_s(run, _changes(10, 0, 90), 100) == 100 + 40
    assert cost_s(_run() | {"generations": generations[1:2]}, _changes(50, 0, 50), 100) is None


def test_what_is_removed_is_asked_as_often_as_an_audit_asks():
    few = _changes(0, 2, 98)
    assert cost_s(_run(audit_s=50.0), few, 100) == 100 + 20 + 2 * 120 * 0.5
    assert cost_s(_run(audit_s=None), few, 100) is None  # as in folders of earlier versions
    assert cost_s(_run(), few, 100) is None
    three = _run(audit_s=5.0) | {"records": {"n": 3}}  # an audit's batches are hardly filled
    assert cost_s(three, _changes(0, 1, 2), 2) == pytest.approx(100 + 400 / 3 + 120 * 5 / 25)
    # What it took last time isn't taken for what every update takes.
    run = _run(audit_s=50.0, forgetting_s=60.0, given_up_s=30.0)
    assert cost_s(run, _changes(2, 0, 98), 100) == 10 + 20


def test_what_was_measured_once_of_the_base_model_is_not_paid_again():
    assert cost_s(_run(once_s=90.0), _changes(10, 0, 90), 100) == 10 + 20
    assert cost_s(_run(once_s=0.0), _changes(10, 0, 90), 100) == 100 + 20


def test_of_a_resumed_run_only_its_own_seconds_of_training_are_in_its_time():
    """Two thirds of the 200 s of training were another process's."""
    resumed = _run(wall_s=166.0, trained_before_s=134.0)
    assert cost_s(resumed, _changes(10, 0, 90), 100) == 100 + 20


def test_a_handful_takes_as_long_as_a_batch_but_for_training():
    assert cost_s(_run(), Changes(added=_changes(2, 0, 1).added), 2) == 100 / 4 + 4
    assert cost_s(_run(), _changes(2, 0, 98), 100) == 100 + 20  # a step of two is one of ten


def test_looking_for_what_was_removed_takes_as_long_as_the_last_time():
    last = {"anew": True, "training_s": 200.0, "records": 100, "removed": 3}
    run = _run(wall_s=360.0, audit_s=5.0, forgetting_s=60.0) | {"generations": [last]}
    assert cost_s(run, _changes(8, 2, 90), 100) == 100 + 2 * 20 + 20
    run["generations"].append({**last, "removed": 0})
    assert cost_s(run, _changes(8, 2, 90), 100) == 100 + 2 * 120 * 0.05 + 20


def test_what_is_lost_can_only_be_trained_anew():
    line = CertifiedRecord(
        id="1", sha256="0" * 64, certified=True, recalled=True, min_p=1, n_tokens=1
    )
    lost = Changes(unchanged=_changes(0, 0, 99).unchanged, lost=(line,))
    assert cost_s(_run(), lost, 99) == 99 + 198
