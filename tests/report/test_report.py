"""The report from files alone: what it reads, what it says, what it refuses, what it writes."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reporting import (
    ALPHA,
    BETA,
    FLOOR,
    HOSTILE,
    C,
    hostile_audit,
    large_audit,
    mixed_audit,
    probe_cells,
    probe_view,
    write_audit,
)

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import ConfigError, DataError, MemlawError, OutputError
from memlaw.law.plan import plan_rank
from memlaw.law.store import Cell, CellStore
from memlaw.measure.files import _METADATA, _NEEDED, read_parquet
from memlaw.report import figures, make_report, tables
from memlaw.report.embed import safe_json
from memlaw.report.page import render
from memlaw.report.recall_data import recall_data
from memlaw.report.run_page import verdict
from memlaw.report.sources import probes_of, read_source
from memlaw.train.snapshots import SNAPSHOTS_FILE


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama, phone_book):
    """A folder that `write` made; nothing is certified in so few epochs."""
    out = tmp_path_factory.mktemp("report") / "out"
    memlaw.write(phone_book, out, model=str(llama), rank=4, max_epochs=3)
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """An audit in which some records fail."""
    return write_audit(mixed_audit(), tmp_path_factory.mktemp("mixed") / "mixed.json")


def _totals(view):
    """What an audit's files say of all records together."""
    return {k: v for k, v in view.recall.summary().items() if k != "records"}


@pytest.mark.slow
def test_it_needs_no_torch(mixed, tmp_path):
    script = (
        "import sys; from memlaw.cli.dispatch import run\n"
        f"assert run(['report', {str(mixed)!r}, '-o', {str(tmp_path / 'x.html')!r}]) == 0\n"
        f"assert run(['report', {str(mixed)!r}, '-o', {str(tmp_path / 'x')!r}, '--format', 'svg'])"
        " == 0\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_a_write_folder_is_read_with_verdicts_prompts_and_snapshots(finished):
    view = read_source(finished)
    table = pq.read_table(finished / "tokens.parquet").to_pydict()
    assert view.name == "out"
    assert np.allclose(view.recall.tokens.p, table["p"], atol=1e-6)
    assert list(view.recall.token) == table["token"]
    assert view.recall.titles[0] == "Jerry Becerra:"
    assert view.recall.criterion.line == 0.55
    assert view.snapshots.epochs == [1, 2, 3]
    assert view.run["results"]["damage_by_window"][0]["text"]
    assert verdict(view)["word"] == "Not certified"


def test_what_is_said_is_what_the_audit_said(finished):
    certificate = json.loads((finished / "certificate.json").read_text())
    found = read_source(finished).recall
    assert found.n_certified == certificate["n_certified"]
    assert found.n_recalled == sum(r["recalled"] for r in certificate["records"])
    assert len(found.tokens) == sum(r["n_tokens"] for r in certificate["records"])


def test_a_table_without_verdicts_does_too(finished, tmp_path):
    """As folders had before the table's metadata."""
    table = pq.read_table(finished / "tokens.parquet").replace_schema_metadata({})
    pq.write_table(table, tmp_path / "tokens.parquet")
    (tmp_path / "certificate.json").write_bytes((finished / "certificate.json").read_bytes())
    view, whole = read_source(tmp_path), read_source(finished)
    assert _totals(view) == _totals(whole)
    assert view.recall.titles[0] == ""
    assert view.snapshots is None
    pq.write_table(table, tmp_path / "bare.parquet")
    assert read_source(tmp_path / "bare.parquet").recall.n_decoded == 0


def test_the_audits_own_files_are_read_alike(finished, phone_file, tmp_path, capsys):
    table = str(tmp_path / "t.parquet")
    run(["audit", str(phone_file), "--adapter", str(finished), "--json", "--tokens", table])
    (tmp_path / "a.json").write_text(capsys.readouterr().out, encoding="utf-8")
    from_json, from_table = (read_source(tmp_path / name) for name in ("a.json", "t.parquet"))
    assert _totals(from_json) == _totals(from_table)
    assert from_json.recall.records == from_table.recall.records
    assert recall_data(from_json)["token"] == recall_data(from_table)["token"]


@pytest.mark.parametrize(
    ("certified", "harmless", "state", "word"),
    [
        (True, True, "good", "Certified"),
        (True, False, "bad", "Certified, not harmless"),
        (False, True, "bad", "Not certified"),
        (False, False, "bad", "Not certified"),
    ],
)
def test_the_verdict_in_words(finished, certified, harmless, state, word):
    view = read_source(finished)
    n = len(view.recall.records)
    view = replace(
        view,
        certificate=view.certificate
        | {"certified": certified, "n_certified": n * certified, "specific": None},
        run=view.run | {"harmless": harmless},
    )
    said = verdict(view)
    assert (said["state"], said["word"]) == (state, word)
    assert bool(said["yes"]) == certified  # nothing is guaranteed where nothing is certified
    assert "more damage" in said["sentence"] or not (certified and not harmless)


@pytest.mark.parametrize(
    ("specific", "state", "word"),
    [(True, "good", "Certified, specific"), (False, "bad", "Certified, not specific")],
)
def test_the_second_verdict_stands_beside_the_first(finished, specific, state, word):
    view = read_source(finished)
    claim = {
        "certified": True,
        "specific": specific,
        "not_specific_because": ["it leaks", "it makes up"][2 * specific :],
        "harms": {"elsewhere": {"n": 367, "unchanged": 168, "floor": 236, "share_of_floor": 0.71}},
    }
    view = replace(view, certificate=view.certificate | claim, run=view.run | {"harmless": True})
    said = verdict(view)
    assert (said["state"], said["word"]) == (state, word)
    assert "168 answers as before, 71% of the 236 that rounding" in said["sentence"]
    assert ("It is not specific: see below" in said["sentence"]) is not specific
    assert (said["no"][0] == "It leaks.") is not specific
    without = replace(view, certificate=view.certificate | {"harms": {}})  # not on record
    assert "answers as before" not in verdict(without)["sentence"]


def test_what_other_batches_may_say_is_not_guaranteed(finished):
    view = read_source(finished)
    for rounding, said in (({"sd_nats": 0.3, "flips_per_1000": 0.25}, ["0.25"]), (None, [])):
        view.certificate["rounding"] = rounding
        found = [text for text in verdict(view)["no"] if "other batches" in text]
        assert [re.search(r"right here (\S+) are", text)[1] for text in found] == said


def test_an_audit_is_no_certificate(mixed):
    said = verdict(read_source(mixed))
    assert said["word"] == "Not all recited"
    assert "no certificate" in said["no"][0]


@pytest.mark.slow
def test_a_page_has_everything_in_it(finished, mixed, tmp_path):
    (path,) = make_report([finished, mixed], tmp_path / "deep" / "r.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""<[^>]+(src|href)=["'](?!data:|#)""", markup)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for said in ("Not certified", "Provenance", "memlaw audit RECORDS", "What isn’t"):
        assert said in page
    assert str(tmp_path) not in page


def test_the_same_sources_give_the_same_page(finished):
    view = read_source(finished)
    assert render([view], []) == render([read_source(finished)], [])


def test_hostile_text_is_data(tmp_path):
    source = write_audit(hostile_audit(), tmp_path / "h<script><b>.json")
    page = make_report([source], tmp_path / "h.html")[0].read_text(encoding="utf-8")
    plain = make_report([write_audit(mixed_audit(), tmp_path / "m.json")], tmp_path / "m.html")
    ordinary = plain[0].read_text(encoding="utf-8")
    for tag in ("<script", "<img", "<svg", "<!--", "</script", "<b>"):
        assert page.count(tag) == ordinary.count(tag), tag
    assert "\u2028" not in page


def test_json_in_a_script_comes_back_the_same():
    content = {"text": [*HOSTILE, "\u2028&<>"]}
    text = str(safe_json(content))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == content


@pytest.mark.slow
def test_ten_thousand_records_are_a_few_megabytes(tmp_path):
    source = write_audit(large_audit(), tmp_path / "l.json")
    (path,) = make_report([source], tmp_path / "l.html")
    assert path.stat().st_size < 5_000_000


def test_more_than_fits_leaves_the_surest_out(monkeypatch, mixed):
    monkeypatch.setattr("memlaw.report.recall_data._MOST_TOKENS", 320)
    view = read_source(mixed)
    recall, data = view.recall, recall_data(view)
    shown = {row[0] for row in data["records"]}
    assert data["left_out"] == len(recall.records) - len(shown) > 0
    low = {r.id: recall.tokens.p[recall.token_rows(i)].min() for i, r in enumerate(recall.records)}
    assert max(low[i] for i in shown) <= min(p for i, p in low.items() if i not in shown)


def test_snapshots_are_thinned_to_what_fits(finished, monkeypatch):
    view = read_source(finished)
    monkeypatch.setattr(
        "memlaw.report.recall_data._MOST_SNAPSHOT_BYTES", 2 * len(view.recall.tokens)
    )
    assert recall_data(view)["epochs"] == [1, 3]


@pytest.mark.slow
def test_a_probe_is_read_task_by_task(tmp_path):
    """From its store, and from what `memlaw probe --json` prints."""
    store = CellStore(tmp_path / "runs")
    rows = [*probe_cells()[:12], *probe_cells("phonebook")[:12]]
    training = {"rank", "seed"}
    store.put(
        [
            Cell(
                config={"task": row["task"], "length": row["n_tokens"]}
                | {"training": {name: row[name] for name in training}},
                status="success",
                result={k: v for k, v in row.items() if k not in {"task", "status", *training}},
                provenance={"wall_s": 1.0, "model": "embedded"},
            )
            for row in rows
        ]
    )
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0] | {"status": "failed"}]))
    for source in (tmp_path / "runs", tmp_path / "rows.json"):
        found = read_source(source)
        assert sorted(p.name.split(": ")[1] for p in found) == ["noise:1.0", "phonebook"]
        assert [len(p.cells) for p in found] == [12, 12]


@pytest.mark.slow
def test_the_law_is_fitted_and_shown_with_its_intervals_and_doubts():
    view = probe_view()
    found = {p.name: (p.low, p.high) for p in view.law.parameters}
    for name, true in (("C", C), ("α", ALPHA), ("β", BETA), ("b", FLOOR)):
        assert found[name][0] < true < found[name][1]
    law = replace(view.law, notes=["can't tell β from b"])
    page = render([], [replace(view, law=law)])
    for said in ("ΔL = C s^α", f"{law.r2:.4f}", "can&#39;t tell β from b", "saturating"):
        assert said in page


@pytest.mark.slow
def test_laws_stand_side_by_side():
    view = probe_view()
    other = replace(view, name="runs: phonebook")
    assert tables.laws_table([view]) is None
    table = tables.laws_table([view, other])
    assert [row[0] for row in table.rows] == ["runs: noise:1.0", "runs: phonebook"]
    assert table.head == ("cells", "C", "α", "β", "b", "R²")
    assert "Laws side by side" in render([], [view, other])


def test_an_interval_without_an_end_is_no_number():
    assert tables.number(float("-inf")) == "−∞"
    assert tables.number(None) == "–"


@pytest.mark.slow
def test_settings_are_told_apart(tmp_path):
    cells = [c | {"objective": o} for o in ("sft", "memft_threshold") for c in probe_cells()[:8]]
    assert [v.name for v in probes_of(cells, name="runs")] == ["runs: sft", "runs: memft_threshold"]


def test_cells_without_a_law_are_shown():
    cells = [cell | {"certified": False} for cell in probe_cells()[:3]]
    (view,) = probes_of(cells, name="runs")
    assert view.law is None
    page = render([], [view])
    assert "Loss" in page
    assert "data-plan=" not in page.partition("<script>")[0]


@pytest.mark.parametrize("n_tokens", [20, 32, 100, 256, 400, 1500])
def test_the_pages_plan_is_the_planners(n_tokens):
    plan = probe_view().plan
    for confidence in (0.05, 0.5, 0.9, 0.99):
        said = plan_rank(probe_cells(), n_tokens, confidence=confidence)
        assert abs(plan.probability(said.rank, n_tokens) - said.probability) < 0.01
        assert abs(plan.rank(n_tokens, confidence) - said.rank) <= max(1, 0.05 * said.rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "svg", "md"])
def test_figures_and_tables_in_files(kind, finished, mixed, tmp_path):
    paths = make_report([finished], tmp_path / "one", format=kind)
    names = {p.name for p in paths}
    assert {"summary.md", "weakest.md", "damage.md", "suffered.md"} <= names
    assert all(p.stat().st_size for p in paths)
    if kind != "md":
        assert {f"{n}.{kind}" for n in ("probability", "training", "damage")} <= names
        start = (tmp_path / "one" / f"damage.{kind}").read_bytes()[:4]
        assert start == (b"\x89PNG" if kind == "png" else b"<svg")
    once = make_report([finished], tmp_path / "once", format="md")
    twice = make_report([finished, finished], tmp_path / "twice", format="md")
    assert len(twice) == len(set(twice)) == 2 * len(once)
    assert {"out-summary.md", "out-2-summary.md"} <= {p.name for p in twice}
    two = make_report([finished, mixed], tmp_path / "two", format="md")
    assert {"out-summary.md", "mixed.json-summary.md"} <= {p.name for p in two}


@pytest.mark.slow
def test_figures_for_papers():
    cells, law = probe_cells(), probe_view().law
    for chart in (
        figures.delta_loss_over_rank(cells, law),
        figures.delta_loss_over_length(cells),
        figures.predicted_against_measured(law),
        figures.residuals(law),
        figures.heatmaps(cells),
    ):
        assert figures.export(chart.to_dict(), "svg").startswith(b"<svg")


def test_censored_cells_are_marked():
    drawn = json.dumps(figures.heatmaps(probe_cells()).to_dict())
    assert '0.05*"' in drawn
    assert "Hollow points are censored" in figures.probe_figures(probe_view())[0].caption


def test_a_table_is_markdown_whatever_is_in_it():
    table = tables.Table(name="x", title="x", head=("a", "b"), rows=[("1|2\n<b>", "\\")])
    assert table.to_markdown().splitlines()[2] == "| 1\\|2 &lt;b> | \\\\ |"


def _parquet(columns, path):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "absent", "does not exist"),
        (lambda f: f, "neither a token table"),
        (lambda f: (f / "x.parquet").write_bytes(b"x") and f / "x.parquet", "can't be read"),
        (lambda f: _parquet({"a": [1]}, f / "y.parquet") or f / "y.parquet", "no token table"),
        (lambda f: (f / "x.json").write_text("{") and f / "x.json", "can't be read"),
        (lambda f: (f / "x.json").write_text("1") and f / "x.json", "no JSON object"),
        (lambda f: (f / "x.json").write_text("[]") and f / "x.json", "not a list of cells"),
        (lambda f: (f / "x.json").write_text("{}") and f / "x.json", "no audit"),
        (
            lambda f: write_audit({"records": []}, f / "e.json"),
            "damaged",
        ),
    ],
)
def test_what_it_cannot_read_is_refused(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        make_report([make(tmp_path)], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


NOT_TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize(("summary", "token"), [("{", ["a"]), ("[1]", ["a"]), ("{}", NOT_TEXT)])
def test_a_token_table_whose_text_is_damaged_is_refused(tmp_path, summary, token):
    columns = {name: [0.0] for name in _NEEDED} | {"record": ["r"], "argmax": ["a"]}
    table = pa.table(columns | {"position": [0], "token": token})
    pq.write_table(table.replace_schema_metadata({_METADATA: summary}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet is damaged"):
        read_parquet(tmp_path / "t.parquet")


def test_a_column_whose_name_is_no_text_is_refused(tmp_path):
    _parquet({"qqqq": [1]}, tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content.replace(b"qqqq", b"qq\xc1q"))
    with pytest.raises(DataError, match=r"t\.parquet can't be read as Parquet"):
        read_parquet(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"damage": None}, "damage is None"),
        ({"damage": 9}, "damage is 9"),
        ({"damage": {"n_tokens": "9"}}, "damage.n_tokens is '9'"),
        ({"versions": ["torch"]}, r"versions is \['torch'\]"),
        ({"certified": 1}, "certified is 1"),
        ({"rounding": 1.0}, "rounding is 1.0"),
        ({"rounding": {}}, "rounding.flips_per_1000 is None"),
        ({"rounding": {"flips_per_1000": True}}, "rounding.flips_per_1000 is True"),
        ({"harms": 3}, "harms is 3"),
        ({"harms": {"elsewhere": [1]}}, r"harms.elsewhere is \[1\]"),
        ({"harms": {"elsewhere": {"n": 3}}}, "harms.elsewhere.unchanged is None"),
    ],
)
def test_a_certificate_that_says_what_it_cant_is_refused(finished, tmp_path, wrong, named):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    content = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps(content | wrong))
    with pytest.raises(DataError, match=rf"certificate\.json is not a certificate: {named}"):
        make_report([folder], tmp_path / "x.html")


def test_damaged_snapshots_are_named(finished, tmp_path):
    for name in ("tokens.parquet", "certificate.json", "run.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / SNAPSHOTS_FILE).write_bytes(b"no")
    with pytest.raises(MemlawError, match="Remove it"):
        make_report([tmp_path], tmp_path / "x.html")


def test_what_cannot_be_written_is_refused(mixed, tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        make_report([mixed], tmp_path)
    with pytest.raises(OutputError, match=r"ends in \.html"):
        make_report([mixed], tmp_path / "certificate.json")
    with pytest.raises(OutputError, match="can't be written"):
        make_report([mixed], mixed / "x" / "r.html")
    with pytest.raises(ConfigError, match="nothing to report"):
        make_report([], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="no format 'pdf'"):
        make_report([mixed], tmp_path / "r.html", format="pdf")


def test_without_the_extra_it_says_what_to_install(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'memlaw\[report\]'"):
        make_report([mixed], tmp_path / "r.html")


def test_the_command_names_what_it_wrote(mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(mixed)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert run(["report", str(mixed), "-o", "figures", "--format", "md"]) == 0
    assert "figures/summary.md" in capsys.readouterr().out
    assert run(["report"]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert run(["report", "absent"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_several_folders_and_a_file_of_settings(finished, mixed, tmp_path):
    (tmp_path / "a.toml").write_text('format = "md"\n')
    given = ["report", finished, mixed, "-o", tmp_path / "out", "--config", tmp_path / "a.toml"]
    assert run([str(text) for text in given]) == 0
    assert (tmp_path / "out" / "mixed.json-summary.md").is_file()
