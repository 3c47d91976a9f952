"""What an adapter's folder has on record: its run, its base model, its certificate."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from memlaw.core.commitment import commitment, read_key
from memlaw.core.errors import AdapterError, CertificateError
from memlaw.core.files import CERTIFICATE_FILE, RUN_FILE, read_json
from memlaw.model.formats import adapter_base, adapter_config_file
from memlaw.settings.choices import EMBEDDED


class AdapterFolder:
    """A folder that `write` or PEFT wrote; or none, where a bare base model is measured.

    Args:
        path: the folder, or None.

    Attributes:
        path: the folder, or None.
        run: the content of `run.json`; empty without a folder, and for adapters that `write` did
            not make.

    Raises:
        AdapterError: it is not a folder, or its `run.json` can't be read or is not memlaw's.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.run: dict[str, Any] = {}
        if path is None:
            return
        if not path.is_dir():
            raise AdapterError(f"{path} is not a folder. Name the folder that holds the adapter.")
        if (path / RUN_FILE).is_file():
            self.run = _read_run(path / RUN_FILE)

    def setting(self, name: str, otherwise: Any) -> Any:
        """A setting of the run that made the adapter; `otherwise` where it is not on record."""
        return self.run.get("config", {}).get(name, otherwise)

    @property
    def base_model(self) -> str | None:
        """What names the base model that the adapter was trained on; None without a folder.

        Of a run the first place that is here: where it was, the GGUF file that it was unpacked
        from, or what was asked for. Its hash tells whether it still is that model.

        Raises:
            AdapterError: the adapter's settings name none.
        """
        if self.path is None:
            return None
        if self.run:
            base = self.run["base"]
            if base["spec"] == EMBEDDED:
                return EMBEDDED
            places = list(filter(None, [base["path"], base.get("source"), base["spec"]]))
            # Not Path.exists: that raises where a name is longer than names may be.
            here = [place for place in places if os.path.exists(os.path.expanduser(place))]
            return (here or places)[0]
        named = adapter_base(self.path).path
        if not (isinstance(named, str) and named):
            raise AdapterError(
                f"{self.base_is_named_by} names no base model ({json.dumps(named)}). Name the one "
                "that the adapter was trained on with --model."
            )
        return named

    @property
    def base_is_named_by(self) -> Path | None:
        """The file that names the base model; None without a folder."""
        if self.path is None:
            return None
        return self.path / RUN_FILE if self.run else adapter_config_file(self.path)

    @property
    def base_sha256(self) -> str | None:
        """Hash of the base weights that the adapter was trained on; None: not on record."""
        if self.run:
            return str(self.run["base"]["sha256"])
        return None if self.path is None else adapter_base(self.path).sha256

    def longest_record(self) -> int | None:
        """Target tokens of the longest record in the certificate; None without a certificate.

        Raises:
            CertificateError: the certificate can't be read, or is none.
        """
        lines = self._certified()
        return None if lines is None else max(int(line["n_tokens"]) for line in lines)

    def on_record(self, hashes: Collection[str]) -> bool | None:
        """Whether one of these is the hash of a record in the certificate.

        Returns:
            None: there is no certificate, or not the private file that opens its commitments.

        Raises:
            CertificateError: the certificate or the private file can't be read, or is none.
        """
        lines = self._certified()
        if self.path is None or lines is None:
            return None
        names = {str(line["name"]) for line in lines}
        if not any(line["is_salted"] for line in lines):
            return bool(names & set(hashes))
        key = read_key(self.path)
        return None if key is None else bool(names & {commitment(key, h) for h in hashes})

    def _certified(self) -> list[dict[str, Any]] | None:
        """The certificate's lines, a record each; at least one."""
        if self.path is None or not (path := self.path / CERTIFICATE_FILE).is_file():
            return None
        mend = f"Name the {CERTIFICATE_FILE} that 'memlaw write' made."
        content = read_json(path, CertificateError, mend)
        try:
            lines = [
                {
                    "n_tokens": int(line["n_tokens"]),
                    "name": line["commitment"] if "commitment" in line else line["sha256"],
                    "is_salted": "commitment" in line,
                }
                for line in content["records"]
            ]
            if not lines:
                raise ValueError("it has no records")
        except (ValueError, KeyError, TypeError) as error:
            raise CertificateError(
                f"{path} is not a certificate ({type(error).__name__}: {error}). {mend}"
            ) from error
        return lines


_OBJECTS = ("config", "records", "adapter", "results", "timings", "rendering")


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path, AdapterError, "Fetch or make it again.")
    base = run.get("base")
    if not isinstance(base, dict) or not {"spec", "path", "sha256"} <= set(base):
        raise AdapterError(
            f"{path} was not written by memlaw: it names no base model. Move it out of the "
            "adapter's folder, and name the base with --model."
        )
    places = [base["path"], base.get("source")]
    named = isinstance(base["spec"], str) and base["spec"]
    if not named or not all(isinstance(place, str | None) for place in places):
        raise AdapterError(
            f"{path} is damaged: the base model's place is {base!r:.80}. Fetch it again."
        )
    for name in _OBJECTS:
        if not isinstance(run.get(name, {}), dict):
            raise AdapterError(f"{path} is damaged: {name} is {run[name]!r:.40}. Fetch it again.")
    lines = run.get("generations", [])
    if not (isinstance(lines, list) and all(isinstance(line, dict) for line in lines)):
        raise AdapterError(f"{path} is damaged: generations are {lines!r:.40}. Fetch it again.")
    return run
