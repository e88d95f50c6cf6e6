"""One output folder, one run: started again with the same settings it goes on, with others it refuses."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_nullspace.files import write_json

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
# Settings that came later, and what a run did that was begun without them.
_BEFORE = {
    "attn_implementation": None,
    "noise_learner": "descent",
    "noise_pool_images": 0,
    "noises_at_once": 1,
    "noise_bank_size": 1,
    "noise_mix": "one",
    "noise_warm_start": False,
}
_LEFT_BY_A_RUN = (
    "checkpoint-*",
    "noises",
    "base",
    "base.part",
    "control",
    "ema",
    "nullspace_history.json",
    "cost.json",
    "results.*",
)


class OtherRunError(ValueError):
    """The folder belongs to a run with other settings."""


def claim_folder(folder: Path, settings: Mapping[str, Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Make ``folder`` the one of the run with ``settings`` (groups of values that JSON can hold).

    Raises:
        OtherRunError: if it holds a run with other settings and ``overwrite`` is not set; the message names them.
        OSError: if the folder cannot be written.
    """
    wanted = json.loads(json.dumps({group: dict(values) for group, values in settings.items()}, default=str))
    path = folder / SETTINGS_NAME
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = _differences(found, wanted)
        if not changed:
            return
        if not overwrite:
            raise OtherRunError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:5])}). "
                "Choose another --output_dir, or delete that run with --overwrite true"
            )
        for pattern in _LEFT_BY_A_RUN:
            for left in folder.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_json(path, wanted)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    lines = []
    for group in sorted({*found, *wanted}):
        old, new = found.get(group, {}), wanted.get(group, {})
        for key in sorted({*old, *new} - _IRRELEVANT):
            there = old.get(key, _BEFORE.get(key)) if old else None
            if there != new.get(key):
                lines.append(f"{key}: {there} there, {new.get(key)} now")
    return lines
