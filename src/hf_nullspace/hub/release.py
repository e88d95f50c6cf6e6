"""A finished run becomes a repository: staged without this machine's paths, pushed as one commit, pulled and compared.

Also the records that the project keeps of its own releases, and the cards that are rendered from them.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_nullspace.cards.card import EVAL_RESULTS, model_card, write_card
from hf_nullspace.cards.run_folder import COST_NAME, HISTORY_NAME, REPORTS, SETTINGS_NAME, portable
from hf_nullspace.cards.staging import published_copy
from hf_nullspace.core.files import damaged_files, size_and_hash, write_json, write_text
from hf_nullspace.core.uploads import push_folder
from hf_nullspace.hub.planned import planned_card
from hf_nullspace.hub.recheck import ReleaseError
from hf_nullspace.noise.artifact import CONFIG_NAME
from hf_nullspace.training.publishing import REPLACED, published_files

RECORDS = ("config.json", "preprocessor_config.json", SETTINGS_NAME, HISTORY_NAME, COST_NAME, CONFIG_NAME, *REPORTS)
RELEASE_NAME = "release.json"


def stage(run: Path, folder: Path, repo_id: str, *, license: str | None = None, note: str | None = None) -> list[Path]:
    """Render the card into ``run`` and copy what is published into ``folder``; returns the copies.

    Weights and pictures are copied as they are; in JSON, Markdown and CSV, and in the noises' provenance, paths of this
    machine become names. Checkpoints, base model, control, optimizer states and pickles stay here.
    """
    write_card(run, repo_id, license=license, note=note)
    return [published_copy(run / name, folder / name) for name in published_files(run)]


def push_and_verify(folder: Path, repo_id: str, *, private: bool | None, repeat: str, repo_type: str = "model") -> str:
    """Push a staged folder as one commit, pull that commit into a fresh cache, compare every file; returns its address.

    Raises:
        UploadError: if the Hub does not take it.
        ReleaseError: if what comes back is not what was sent; the message names the files.
    """
    pushed = push_folder(
        folder,
        repo_id,
        repo_type=repo_type,
        space_sdk="gradio" if repo_type == "space" else None,
        private=private,
        commit_message="Release",
        replace=(*REPLACED, f"{EVAL_RESULTS}/*") if repo_type == "model" else (),
        afterwards=f"Nothing was changed; repeat the release with {repeat}",
    )
    with tempfile.TemporaryDirectory() as cache:
        try:
            pulled = snapshot_download(repo_id, repo_type=repo_type, revision=pushed.oid, cache_dir=cache)
        except OSError as error:  # the Hub's errors are OSErrors, too
            raise ReleaseError(
                f"{repo_id} was pushed (commit {pushed.oid}), but cannot be pulled back: {error}. Repeat with {repeat}"
            ) from error
        sent = {path.relative_to(folder).as_posix(): size_and_hash(path) for path in _files(folder)}
        lacking = damaged_files(pulled, sent)
    if lacking:
        raise ReleaseError(
            f"{repo_id} at commit {pushed.oid} is not what was sent: it lacks {', '.join(lacking)}. "
            f"Repeat with {repeat}"
        )
    return str(pushed.commit_url)


def listing(folder: Path) -> list[str]:
    """A line with size and name for every file of a folder, and their sum."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in _files(folder)}
    lines = [f"{size:>12,}  {name}" for name, size in sizes.items()]
    return [*lines, f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- what the project keeps of its own


def keep_records(run: Path, name: str, records: Path, **released: str | None) -> Path:
    """Copy the JSON files that a card is made of into ``records/NAME``, without this machine's paths.

    ``released`` (repo_id, license, note) goes to the card with them.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ReleaseError(
            f"{name!r} is no name for a folder of records; expected letters, digits, '-', '_' and '.', starting with a "
            "letter or a digit"
        )
    folder = records / name
    for file in RECORDS:
        if (run / file).is_file():
            write_json(folder / file, portable(json.loads((run / file).read_text(encoding="utf-8"))))
        else:
            (folder / file).unlink(missing_ok=True)
    write_json(folder / RELEASE_NAME, {key: value for key, value in released.items() if value is not None})
    return folder


def render_cards(records: Path, configs: Iterable[Path], cards: Path) -> list[Path]:
    """Write ``cards/NAME.md`` for every run of ``records``, and for every configuration that was not run yet."""
    found = {config.stem: planned_card(config) for config in sorted(configs)}
    for folder in sorted(path.parent for path in records.glob(f"*/{RELEASE_NAME}")):
        released = json.loads((folder / RELEASE_NAME).read_text(encoding="utf-8"))
        found[folder.name] = model_card(folder, **released)
    return [write_text(cards / f"{name}.md", str(card).rstrip() + "\n") for name, card in found.items()]
