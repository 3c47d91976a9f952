"""HTML and scripts in records, tokens, ids, names of models and files, shown in a report.

The page puts data into the document by `textContent` or through Jinja2's autoescape, JSON in
scripts with `<` written out, and its own policy forbids scripts but its own (by hash). Tried:
every text that a report is made from, with what would end a script element, an attribute or a
comment.
"""

import json
import re
from pathlib import Path
from typing import Any

from common import copied, edited, require

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><!--{{7*7}}"


def attempt(place: Path) -> str:
    """Put it everywhere, make the page, and look for it unescaped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memlaw.report.make import make_report

    folder = copied(place / "<b>&\"'<!--")

    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: everywhere(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [everywhere(inner) for inner in value]
        return EVIL + value if isinstance(value, str) else value

    table = pq.read_table(folder / "tokens.parquet")
    meta = json.loads(table.schema.metadata[b"memlaw"])
    meta["records"] = everywhere(meta["records"])
    columns = {
        name: [EVIL + text for text in table[name].to_pylist()]
        if pa.types.is_string(table[name].type)
        else table[name]
        for name in table.column_names
    }
    new = pa.table(columns).replace_schema_metadata({b"memlaw": json.dumps(meta)})
    pq.write_table(new, folder / "tokens.parquet")
    for name in ("run.json", "certificate.json"):
        edited(folder / name, lambda content: content.update(everywhere(content)))
    (page,) = make_report([folder], place / "page.html")
    text = page.read_text(encoding="utf-8")
    require("<script>alert" not in text, "a script came through")
    require(not re.search(r"<img[^>]*onerror", text), "an image with a handler came through")
    require("alert(1)" in text, "the text isn't shown at all: nothing was tried")
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', text)
    require(policy is not None and "unsafe" not in policy[1].split("style-src")[0], "no policy")
    return "shown as text, under a policy that allows no script but the page's own"
