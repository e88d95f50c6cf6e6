"""One output folder, one run: started again with the same settings it goes on, with others it refuses."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_nullspace.core.files import DamagedFileError, read_json, write_json

SETTINGS_NAME = "run.json"
# What does not change the result, or belongs to the machine and not to the run.
_IRRELEVANT = {
    "overwrite",
    "disable_tqdm",
    "logging_dir",
    "output_dir",
    "private",
    "push_to_hub",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "report_to",
    "run_name",
}
CONTENTS = "contents"
"""Group of run.json: fingerprints of the run's inputs, independent of names."""
WRITTEN = (
    "checkpoint-*",
    "noises",
    "nullspace_*",
    "base",
    "base.part",
    "control",
    "beside",
    "ema",
    "model*.safetensors*",
    "adapter_model.safetensors",
    "training_args.bin",
    "cost.json",
    "results.*",
    "noise.png",
    "interpolation.*",
    "robustness",
    SETTINGS_NAME,
)
"""What ``--overwrite true`` deletes of the run in a folder: all that another run would not write again."""
_OVERWRITE = "Choose another --output_dir, or delete what that run wrote with --overwrite true"


class OtherRunError(ValueError):
    """The folder belongs to a run with other settings or contents, or to something else than a run."""


def check_folder(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Nothing is written: a refusal is to come before the work.

    Args:
        settings: groups of values that JSON can hold.

    Raises:
        OtherRunError: if the folder holds a run with other settings, which are named, or files and no run.
        DamagedFileError: if its run.json cannot be read.
    """
    found = _read(folder)
    if found is not None and (changed := _differences(found, _as_json(settings))):
        raise OtherRunError(f"{folder} holds a run with other settings ({'; '.join(changed[:5])}). {_OVERWRITE}")


def claim_folder(
    folder: Path,
    settings: Mapping[str, Mapping[str, Any]],
    contents: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    written: Sequence[str] = WRITTEN,
    say: Callable[[str], None] = print,
) -> str:
    """Make ``folder`` the one of the run with ``settings`` that begins with ``contents`` (fingerprints, by name).

    Returns the run's identity: a hash of both, for what belongs to it alone, such as its checkpoints.

    ``overwrite`` deletes what another run wrote there (the patterns ``written``), and tells ``say`` what; other files
    stay. A folder that is not empty and holds no run is refused all the same.

    Raises:
        OtherRunError: if it holds a run with other settings or contents, which are named, or files and no run.
        DamagedFileError: if its run.json cannot be read.
        OSError: if the folder cannot be written.
    """
    try:
        check_folder(folder, settings)
        found = _read(folder)
        began = (found or {}).get(CONTENTS)
        if changed := _changed(began or {}, contents or {}) if began else []:
            raise OtherRunError(
                f"{folder} holds a run that began with something else under the same names ({'; '.join(changed[:5])}). "
                f"{_OVERWRITE}"
            )
    except (OtherRunError, DamagedFileError):
        if not (overwrite and (folder / SETTINGS_NAME).exists()):
            raise
        _delete_run(folder, written, say)
        found, began = None, None
    if found is None or began is None:
        began = {CONTENTS: dict(contents)} if contents else {}
        write_json(folder / SETTINGS_NAME, _as_json(settings) | began, sealed=True)
    relevant = {
        group: {name: value for name, value in values.items() if name not in _IRRELEVANT}
        for group, values in _as_json(settings).items()
    }
    text = json.dumps([relevant, dict(contents or {})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return json.loads(json.dumps({group: dict(values) for group, values in settings.items()}, default=str))


def _read(folder: Path) -> dict[str, Any] | None:
    """run.json, or None in a folder where no run has written more than that; hidden files (the lock) do not count."""
    path = folder / SETTINGS_NAME
    names = sorted(file.name for file in folder.glob("*") if not file.name.startswith("."))
    if [name for name in names if not _is_empty(folder / name)] == [SETTINGS_NAME]:
        return None
    if path.exists():
        try:
            return read_json(path)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}. {_OVERWRITE}") from error
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise OtherRunError(
            f"{folder} is not empty ({', '.join(names[:3])}{more}) and holds no run of this recipe: {SETTINGS_NAME} is "
            "not there. Choose a new --output_dir, or empty this one"
        )
    return None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(below.is_file() for below in path.rglob("*"))


def _delete_run(folder: Path, written: Sequence[str], say: Callable[[str], None]) -> None:
    to_delete = sorted({left for pattern in written for left in folder.glob(pattern)})
    say(f"Deleting the earlier run in {folder}: {', '.join(left.name for left in to_delete)}")
    for left in to_delete:
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    groups = sorted({*found, *wanted} - {CONTENTS})
    return [line for group in groups for line in _changed(found.get(group, {}), wanted.get(group, {}))]


def _changed(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted({*there, *now} - _IRRELEVANT)
    return [
        f"{name}: {there.get(name)} there, {now.get(name)} now" for name in names if there.get(name) != now.get(name)
    ]
