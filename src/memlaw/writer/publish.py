"""`push`: what others may have of a folder, in a form that means the same on their machines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import read_certificate
from memlaw.core.errors import AdapterError, ConfigError, OutputError
from memlaw.core.files import CERTIFICATE_FILE, write_text
from memlaw.export.signing import sign
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.model.formats import ADAPTER_FILES, adapter_base, adapter_config_file
from memlaw.model.locate import is_a_path
from memlaw.model.tokenizer import TOKENIZER_FILES
from memlaw.settings.choices import EMBEDDED, EMBEDDED_HUB_ID, portable_base
from memlaw.writer.folder import CARD_FILE

# All that is ever uploaded. Everything else stays: records, tokens, answers, settings, checkpoints.
PUBLIC = (
    *ADAPTER_FILES,
    CERTIFICATE_FILE,
    CARD_FILE,
    *TOKENIZER_FILES,
)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        repo: where to.
        files: names of what is uploaded.
        left_out: names of files and folders that aren't.
        url: of the commit; empty on a dry run.
    """

    repo: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    url: str


def push(
    folder: str | Path,
    repo: str,
    *,
    base: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    private: bool = False,
    key: Path | None = None,
    dry_run: bool = False,
    api: Any = None,
) -> Pushed:
    """Upload an adapter, its certificate and its card to the Hugging Face hub.

    Args:
        folder: that `write` or PEFT wrote.
        repo: OWNER/NAME; made if it isn't there.
        base: hub id of the base model (default: what it was asked for by, if that is one).
        license: of the adapter, as the card names it.
        datasets: hub ids of the data that it was trained on, likewise.
        private: a new repository is private.
        key: sign what is uploaded with this private key.
        dry_run: only say what would be uploaded.
        api: instead of `huggingface_hub.HfApi`.

    Raises:
        AdapterError: there is no adapter in the folder.
        ConfigError: the base model has no name that others could use; or see `sign`.
        OutputError: the hub refuses.
    """
    folder = Path(folder)
    of_run = AdapterFolder(folder)
    adapter_config_file(folder)  # there is an adapter
    local = _local_names(of_run)
    if base == EMBEDDED:
        base = EMBEDDED_HUB_ID
    elif base is not None and is_a_path(base):
        raise ConfigError(f"--base {base} is a path on this machine. Give the model's hub id.")
    base = base or next((name for n in local if (name := _hub_id(n, local))), None)
    if base is None:
        raise ConfigError(
            f"the base model of {folder} is a path on this machine ({', '.join(local)}). Say by "
            "--base what it is called on the hub."
        )
    with tempfile.TemporaryDirectory(prefix="memlaw-") as name:
        stage = Path(name)
        _stage(folder, stage, local, base)
        _fill_card(stage / CARD_FILE, base, license, datasets)
        if key is not None:
            sign(stage, key)
        found = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
        files = tuple(sorted(path.as_posix() for path in found))
        url = "" if dry_run else _upload(stage, repo, private, api)
    left = tuple(sorted({path.name for path in folder.iterdir()} - {p.parts[0] for p in found}))
    return Pushed(repo=repo, files=files, left_out=left, url=url)


def _local_names(folder: AdapterFolder) -> list[str]:
    """All that the base model is called in the folder, what it was asked for by first."""
    assert folder.path is not None
    run = folder.run.get("base", {})
    names = [run.get("spec"), run.get("path"), run.get("source"), adapter_base(folder.path).path]
    if (path := folder.path / CERTIFICATE_FILE).is_file():
        names.append(read_certificate(path).base_model)
    found = list(dict.fromkeys(str(name) for name in names if name))
    if not found:
        raise AdapterError(f"{folder.base_is_named_by} names no base model. Say it by --base.")
    return found


def _hub_id(name: str, local: Sequence[str]) -> str | None:
    """The hub id that a name is; None: it is a path, be it from another folder than this one."""
    is_end = any(other.endswith(f"/{name}") for other in local)
    return None if is_end else portable_base(name)


def _stage(folder: Path, stage: Path, local: Sequence[str], base: str) -> None:
    """Copy what may be uploaded; where a text names a place on this machine, it names `base`."""
    by_length = sorted(local, key=len, reverse=True)
    places = [name for name in by_length if _hub_id(name, local) is None]
    files = [path for name in PUBLIC for path in (folder / name, *folder.glob(f"{name}/*.jinja"))]
    for name in (str(path.relative_to(folder)) for path in files if path.is_file()):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"{folder / name} is a link to another place, {(folder / name).resolve()}. Put the "
                "file itself there, if others may have it."
            )
        if name in (CERTIFICATE_FILE, CARD_FILE) or (name in ADAPTER_FILES and "json" in name):
            text = (folder / name).read_text(encoding="utf-8")
            for place in places:
                text = text.replace(f'"{place}"', f'"{base}"').replace(f"'{place}'", f"'{base}'")
            write_text(stage / name, text)
        else:
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, stage / name)


def _fill_card(path: Path, base: str, license: str | None, datasets: Sequence[str]) -> None:
    """The metadata that the hub reads: base model, license, data; the card's text stays."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(path) if path.is_file() else ModelCard("---\n---\n")
    data = card.data
    data.base_model = base
    tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    data.tags = [f"base_model:adapter:{base}", *(tags or ["lora", "transformers"])]
    data.library_name = data.library_name or "peft"
    if license:
        data.license = license
    if datasets:
        data.datasets = list(datasets)
    card.save(path)


def _upload(stage: Path, repo: str, private: bool, api: Any) -> str:
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repo, folder_path=stage, commit_message="Adapter and certificate, by memlaw"
        )
    except Exception as error:  # what the hub says, or its client's own, another in each version
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{repo} can't be uploaded to ({first}). Check its name, the network, and "
            "'hf auth login'."
        ) from error
    return str(found)
