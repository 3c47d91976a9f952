"""The page of a folder that was updated: its stream of generations, and records' histories."""

import json

import pytest

import memlaw
from memlaw.core.errors import DataError
from memlaw.report.make import make_report

pytest.importorskip("altair", reason="the extra 'report' is not installed")
SETTINGS = {"specificity": False, "retention": 0, "max_epochs": 300}


@pytest.fixture(scope="module")
def out(llama, phone_book, texts, tmp_path_factory):
    """Three generations: one record added, then one replaced."""
    out = tmp_path_factory.mktemp("stream") / "out"
    book = phone_book[:2]
    assert memlaw.write(book, out, model=str(llama), **SETTINGS, **texts).certified
    assert memlaw.update(out, [*book, ("Bo <Ek>:", "271828")]).taken
    assert memlaw.update(out, [(book[0][0], "555"), book[1], ("Bo <Ek>:", "271828")]).taken
    return out


def _table(out, folder, name):
    make_report([out], folder, format="md")
    lines = (folder / f"{name}.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_generation_has_a_line(out, tmp_path):
    rows = _table(out, tmp_path, "generations")
    assert [row[:6] for row in rows] == [
        ["1", "2", "2", "0", "0", "2"],
        ["2", "3", "1", "0", "0", "3"],
        ["3", "3", "0", "1", "0", "3"],
    ]
    run = json.loads((out / "run.json").read_text())
    assert [row[6] for row in rows] == [str(line["rank"]) for line in run["generations"]]


def test_a_record_that_changed_has_its_history(out, phone_book, tmp_path):
    rows = _table(out, tmp_path, "histories")
    who, number = phone_book[0]
    assert [row for row in rows if row[0] == who] == [[who, "1", number], [who, "3", "555"]]
    added = [row for row in rows if row[0].startswith("Bo")]
    assert [row[1:] for row in added] == [["1", "–"], ["2", "271828"]]
    assert not [row for row in rows if row[0] == phone_book[1][0]]


def test_the_page_shows_them_and_says_what_is_not_kept(out, tmp_path):
    page = tmp_path / "page.html"
    make_report([out], page)
    text = page.read_text()
    assert 'href="#run-0-generations"' in text or "-generations" in text
    assert "3 generations, the present one last" in text
    assert "Bo &lt;Ek&gt;:" in text
    assert "no records are kept" not in text
    (out / "generations" / "1" / "private" / "records.jsonl").unlink()
    make_report([out], page)
    assert "Of 1 earlier one(s) no records are kept" in page.read_text()


def test_the_stream_is_drawn(out, tmp_path):
    """Each generation's seconds in two parts; of a line of an earlier version in one."""
    from memlaw.report.run_charts import stream

    lines = json.loads((out / "run.json").read_text())["generations"]
    del lines[0]["training_s"]
    lines[2] |= {"given_up_s": 0.1}
    # One that was resumed: its seconds are the last process's.
    lines.append({**lines[-1], "number": 4, "wall_s": 1.0, "training_s": 3.0, "given_up_s": 0})
    lines.append({**lines[-1], "number": 5, "wall_s": None, "damage_ci95": [0.1]})
    bars, harms, sizes = (chart.to_dict() for chart in stream(lines))
    bars, harms, sizes = bars["data"], harms["layer"][0]["data"], sizes["data"]
    assert [(row["generation"], row["part"]) for row in bars["values"]] == [
        (1, "in all"),
        (2, "training"),
        (2, "the rest"),
        (3, "training"),
        (3, "given up"),
        (3, "the rest"),
        (4, "training"),
    ]
    of_second = [row["seconds"] for row in bars["values"] if row["generation"] == 2]
    assert sum(of_second) == pytest.approx(lines[1]["wall_s"])
    assert min(of_second) > 0
    assert [row["generation"] for row in harms["values"]] == [1, 2, 3, 4]
    assert {row["what"] for row in sizes["values"]} == {"records", "rank"}
    make_report([out], tmp_path, format="svg")
    for name in ("seconds", "damage", "size"):
        assert (tmp_path / f"generations_{name}.svg").is_file()


def test_a_folder_that_was_never_updated_has_no_such_section(out, tmp_path):
    make_report([out / "generations" / "1"], tmp_path / "page.html")
    assert "the present one last" not in (tmp_path / "page.html").read_text()


def test_of_shards_one_is_to_be_named(tmp_path):
    (tmp_path / "out" / "shards").mkdir(parents=True)
    with pytest.raises(DataError, match="holds shards"):
        make_report([tmp_path / "out"], tmp_path / "page.html")
