"""Make a report: sources to a page, or to a folder of figures and tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.files import atomic_path, made, write_text
from memlaw.report import tables
from memlaw.report.changes import KNOWN, changes_tables, generality_tables
from memlaw.report.generations import generations_tables
from memlaw.report.probe_view import ProbeView
from memlaw.report.run_view import RunView, other_harms
from memlaw.report.sources import read_source

Format = Literal["html", "png", "svg", "md"]
FORMATS = ("html", "png", "svg", "md")
_NEEDED = ("altair", "jinja2", "vl_convert")


def make_report(
    paths: Sequence[str | Path], out: str | Path, *, format: Format = "html"
) -> list[Path]:
    """Make a report of write folders, audits and probe stores. It needs no model and no torch.

    Args:
        paths: at least one: a folder that `write` made, a token table or JSON of `memlaw audit`,
            a probe's folder.
        out: for `html` the file to write, else the folder for a file for each figure and table.
        format: `html` is one page that needs nothing else; `png` and `svg` are figures, with the
            tables as Markdown; `md` is the tables alone.

    Returns:
        The files that were written.

    Raises:
        ConfigError: nothing to show, or what draws figures isn't installed.
        DataError: a path is none of these, or damaged.
        OutputError: it can't be written.
    """
    if not paths:
        raise ConfigError("nothing to report on. Name a write folder, an audit or a probe store.")
    if format not in FORMATS:
        raise ConfigError(f"no format '{format}'. There are {', '.join(FORMATS)}.")
    require_extra()
    runs: list[RunView] = []
    probes: list[ProbeView] = []
    for path in map(Path, paths):
        found = read_source(path)
        runs += [found] if isinstance(found, RunView) else []
        probes += [] if isinstance(found, RunView) else found
    out = Path(out)
    if format == "html":
        from memlaw.report.page import render

        if out.is_dir():
            raise OutputError(f"{out} is a folder. Name the file to write, as {out}/report.html.")
        if out.suffix.lower() not in (".html", ".htm"):
            raise OutputError(f"{out}: a page's name ends in .html. Name it so, or give --format.")
        made(out.absolute().parent)
        write_text(out, render(runs, probes, commands=[Path(p).name for p in paths]))
        return [out]
    return _export(runs, probes, out, format)


def require_extra() -> None:
    """Raise ConfigError unless what draws figures and pages is installed."""
    from importlib.util import find_spec

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(
            f"a report needs {', '.join(missing)}. Install it with: pip install 'memlaw[report]'."
        )


def _export(
    runs: Sequence[RunView], probes: Sequence[ProbeView], out: Path, format: Format
) -> list[Path]:
    from memlaw.report import figures

    made(out)
    views: list[tuple[Any, list[figures.Figure], list[tables.Table]]] = [
        *((run, figures.run_figures(run), _tables_of(run)) for run in runs),
        *((probe, figures.probe_figures(probe), tables.probe_tables(probe)) for probe in probes),
    ]
    written: list[Path] = []
    prefixes = dict.fromkeys(("",))
    for view, drawn, tabled in views:
        prefix = f"{_slug(view.name)}-" if len(views) > 1 else ""
        if prefix and prefix in prefixes:  # two of one name
            prefix = next(p for n in itertools.count(2) if (p := f"{prefix}{n}-") not in prefixes)
        prefixes[prefix] = None
        for figure in drawn if format != "md" else []:
            path = out / f"{prefix}{figure.name}.{format}"
            picture = figures.export(figure.chart, format)
            with atomic_path(path) as work:
                work.write_bytes(picture)
            written.append(path)
        for table in tabled:
            path = out / f"{prefix}{table.name}.md"
            write_text(path, table.to_markdown())
            written.append(path)
    if laws := tables.laws_table(probes):
        path = out / f"{laws.name}.md"
        write_text(path, laws.to_markdown())
        written.append(path)
    return written


def _tables_of(run: RunView) -> list[tables.Table]:
    others = {name: harm for name, harm in other_harms(run).items() if name not in KNOWN}
    return [
        *tables.run_tables(run),
        *changes_tables(run),
        *generality_tables(run),
        *generations_tables(run),
        *(tables.harm_table(name, harm) for name, harm in others.items()),
    ]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
