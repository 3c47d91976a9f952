"""Guesses of a record, tried against a published certificate.

A phone number has few values: with a bare hash of the record, whoever has the certificate tries
them all. Certificates name records by commitments, salted by a key that isn't published; a guess
can't be tried without it. Certificates of format 1, which version 0.1 wrote, have bare hashes:
there the attempt succeeds, and SECURITY.md says so. (The adapter itself recites its records to
whoever asks.)
"""

import json
import shutil
from pathlib import Path

from common import BOOK, MODEL, copied, require


def attempt(place: Path) -> str:
    """Try a hundred thousand guesses, the right one among them."""
    from memlaw.certify.folder import certify_adapter
    from memlaw.core.commitment import commitment, read_key
    from memlaw.data.reading import read_records
    from memlaw.data.record import Record

    folder = copied(place)
    old = json.loads((folder / "certificate.json").read_text())
    right = read_records(BOOK)[0]
    guesses = [
        Record(prompt=right.prompt, completion=f"{n:06}", id="guess").sha256
        for n in range(0, 1_000_000, 10)
    ]
    guesses.append(right.sha256)
    require(bool({line["sha256"] for line in old["records"]} & set(guesses)), "format 1 is salted?")
    shutil.rmtree(folder)
    folder = copied(place)
    certify_adapter(folder, BOOK, model=str(MODEL))
    key = read_key(folder)
    names = {
        line["commitment"]
        for line in json.loads((folder / "certificate.json").read_text())["records"]
    }
    tries = {*guesses, *(commitment(b"", guess) for guess in guesses)}
    tries |= {commitment(bytes(32), guess) for guess in guesses}
    require(not names & tries, "a guess was confirmed without the key")
    require(key is not None and commitment(key, right.sha256) in names, "nothing was tried")
    mode = (folder / "private" / "openings.json").stat().st_mode & 0o077
    require(mode == 0, "others can read the key")
    return f"{len(tries):,} tries, none confirmed; in format 1 the first was"
