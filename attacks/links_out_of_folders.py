"""Symbolic links and `..` in folders that came from others.

A folder can hold a link to a file of the reader's: what is uploaded from it would carry that
file. The index of a folder of shards names folders: with `..` an update would write outside. The
note of who has a lock could be a link to a file that is then written over.
"""

import json
from pathlib import Path

from common import Broken, copied, edited, refused, require


def attempt(place: Path) -> str:
    """Lead out of the folder in each way."""
    from memlaw.core.locks import locked
    from memlaw.shards.layout import read_index
    from memlaw.writer.publish import push

    secret = place / "secret"
    secret.write_text("the reader's own")
    folder = copied(place)
    edited(folder / "run.json", lambda run: run["base"].update(spec="someone/model"))
    for name in ("README.md", "adapter_model.safetensors", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        said = refused(lambda: push(folder, "me/mine", base="someone/model", dry_run=True))
        (folder / name).unlink()
        (folder / name).write_bytes(b"")

    (folder / ".lock").symlink_to(secret)
    with locked(folder):
        pass
    require(secret.read_text() == "the reader's own", "a link was written through")

    for name in ("..", "../../elsewhere", "/tmp", "a/b", "a\\b", ""):
        index = {"format": 1, "adapters": {name: {}}, "records": []}
        (folder / "index.json").write_text(json.dumps(index))
        try:
            refused(lambda: read_index(folder))
        except Broken as error:
            raise Broken(f"a shard named {name!r} is taken") from error
    return said
