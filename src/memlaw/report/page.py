"""The page: one HTML file that needs nothing else.

Text from records reaches the page as data only: escaped JSON that the script shows by
`textContent`, or Jinja2's autoescape. A policy in the page's head forbids everything but the
scripts and styles whose hashes stand there; nothing can be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memlaw import __version__
from memlaw.report import tables
from memlaw.report.probe_page import probe_page
from memlaw.report.probe_view import ProbeView
from memlaw.report.run_page import run_page
from memlaw.report.run_view import RunView


def render(
    runs: Sequence[RunView], probes: Sequence[ProbeView], *, commands: Sequence[str] = ()
) -> str:
    """The page's HTML.

    Args:
        runs: write folders and audits.
        probes: probes, one view for each setting.
        commands: names of what the report is made of, for the line that says how to make it again.
    """
    environment = Environment(
        loader=PackageLoader("memlaw.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = resources.files("memlaw.report")
    files = {name: (here / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    scripts = [_vega(), files["js"]]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_hash(files['css'])}; script-src {' '.join(map(_hash, scripts))}"
    )
    return environment.get_template("page.html.j2").render(
        title=_title(runs, probes),
        policy=policy,
        css=Markup(files["css"]),
        scripts=[Markup(script) for script in scripts],
        runs=[run_page(v, f"run{i}") for i, v in enumerate(runs)],
        probes=[probe_page(v, f"probe{i}") for i, v in enumerate(probes)],
        laws=tables.laws_table(probes),
        version=__version__,
        command=shlex.join(["memlaw", "report", *commands, "-o", "report.html"]),
    )


@functools.cache
def _vega() -> str:
    """The library that draws the figures, as a script without anything that would end its tag."""
    import vl_convert

    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _title(runs: Sequence[RunView], probes: Sequence[ProbeView]) -> str:
    names = [*(r.name for r in runs), *(p.name for p in probes)]
    return f"memlaw: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
