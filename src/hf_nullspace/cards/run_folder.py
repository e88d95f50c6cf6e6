"""What a run left in its folder, read to be shown to others: settings, results, rounds. Nothing is measured here.

Paths of the machine that it ran on become ``/path/to/NAME`` on reading.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_nullspace.core.text import code
from hf_nullspace.noise.artifact import CONFIG_NAME as NOISE_NAME
from hf_nullspace.robustness.checks import Check, unreliable
from hf_nullspace.robustness.records import result_from_record
from hf_nullspace.robustness.report import difference
from hf_nullspace.robustness.scores import Interval
from hf_nullspace.robustness.suite import ConditionResult

REPORTS = ("results.json", "robustness/results.json")  # of a fine-tuning, and of a longer evaluation put beside it
HISTORY_NAME, SETTINGS_NAME, COST_NAME = "nullspace_history.json", "run.json", "cost.json"
INTERPOLATION_NAME = "interpolation.json"
CONTROLS = ("plain", "control")  # how the fine-tuning without noise is called in reports
BUILT_IN = {"digits": "scikit-learn's handwritten digits (built in)"}
LOCAL = "/path/to/"
_LOCAL_FOLDERS = ("outputs", "checkpoints", "runs", "data", "models")  # "outputs/mine" has the form of a Hub id
_PATH = re.compile(
    r"""(?<![\w:/.~-])                      # not inside a word, an address or a relative path
        (?: ~?/ (?:[^\s/,;:'")]+/)*         # /folder/folder/ or ~/folder/
          | [A-Za-z]:\\ (?:[^\\,;'")]+\\)*  # C:\folder\folder\ of Windows
        )
        ([^\s/\\,;:'")]+)                   # the name at its end
    """,
    re.VERBOSE,
)


class RunFolderError(ValueError):
    """A run's folder cannot be read; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A model or a data set by the name it was loaded under; ``hub_id`` is None unless it is on the Hub."""

    name: str
    hub_id: str | None

    def __str__(self) -> str:
        if self.hub_id:
            return code(self.hub_id)
        return BUILT_IN.get(self.name) or f"{code(PurePosixPath(self.name).name)} (a local folder)"


def source(name: str) -> Source:
    """A Hub id is ORG/NAME or NAME, and neither a folder here nor below the usual folders for a run's own files."""
    is_id = re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", name) and name.partition("/")[0] not in _LOCAL_FOLDERS
    return Source(name, name if is_id and name not in BUILT_IN and not Path(name).exists() else None)


@dataclass(frozen=True)
class Report:
    """One results.json, of ``recipes/finetune.py`` or ``recipes/evaluate_robustness.py``.

    ``results`` has the same conditions for every checkpoint; ``subject`` is the checkpoint that the folder holds.
    """

    file: str
    context: Mapping[str, Any]
    versions: Mapping[str, str]
    results: Mapping[str, Sequence[ConditionResult]]
    subject: str
    averages: Mapping[str, Mapping[str, float]]
    differences: Mapping[tuple[str, str, str], Interval]
    """(before, after, condition) -> the paired difference that was recorded."""
    missing: Mapping[str, str]
    checks: Mapping[str, Sequence[Check]]

    @property
    def control(self) -> str | None:
        """The fine-tuning without noise among the checkpoints."""
        return next((name for name in CONTROLS if name in self.results and name != self.subject), None)

    def change(self, other: str, index: int) -> Interval:
        """The subject's accuracy minus that of another checkpoint under one condition, paired over images."""
        recorded = self.differences.get((other, self.subject, self.results[other][index].condition))
        return recorded or difference(self.results, other, self.subject, index)

    def doubts(self, checkpoint: str, result: ConditionResult) -> list[str]:
        """Names of the failed checks that concern a result; the number is never shown without them."""
        return unreliable(self.checks.get(checkpoint, ()), attack="attack" in result.protocol)


class RunFolder:
    """The files of a run, as far as they are there; one that is damaged raises ``RunFolderError``."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().name
        self.config: dict[str, Any] = self.read("config.json") or {}
        # The groups "recipe", "model", "data", "training"; {} for a run of the user's own script.
        self.settings: dict[str, dict[str, Any]] = self.read(SETTINGS_NAME) or {}
        self.history: list[dict[str, Any]] = self.read(HISTORY_NAME) or []  # an entry per round
        self.noise: dict[str, Any] = self.read(NOISE_NAME) or {}  # provenance and norm of the last noise
        self.cost: dict[str, Any] = self.read(COST_NAME) or {}  # passes and seconds, if they were counted
        self.interpolation: dict[str, Any] = self.read(INTERPOLATION_NAME) or {}  # alpha, and what all others had
        training, model, data = (self.settings.get(group, {}) for group in ("training", "model", "data"))
        learned_on = self.noise.get("provenance", {})
        # What was trained: "nullspace", "plain", ...; None where nothing says so.
        self.objective: str | None = training.get("objective") or ("nullspace" if self.history else None)
        # What was fine-tuned; None for a model that the run trained itself, or that nothing names.
        base, learner_base = model.get("model_name_or_path"), learned_on.get("base_model")
        self.base_model: Source | None = source(base) if base else None
        if "model" not in self.settings and learner_base:  # a model of the Hub has its commit there
            self.base_model = Source(learner_base, learner_base if learned_on.get("revision") else None)
        # The commit that it was loaded from, or the revision that was asked for.
        self.base_revision: str | None = learned_on.get("revision") or model.get("model_revision")
        dataset = data.get("dataset_name")
        self.data: Source | None = source(dataset) if dataset else None  # what it was fine-tuned on

    @cached_property
    def reports(self) -> list[Report]:
        return [self._report(name) for name in REPORTS if (self.path / name).is_file()]

    def read(self, name: str) -> Any:
        """A JSON file without this machine's paths; None if it is not there."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return portable(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunFolderError(f"{path} is no valid JSON ({error}); write it again, or delete it") from error

    def _report(self, name: str) -> Report:
        content = self.read(name)
        results: dict[str, list[ConditionResult]] = {}
        differences = {}
        try:
            for entry in content["results"]:
                results.setdefault(entry["checkpoint"], []).append(result_from_record(entry))
            for entry in content.get("differences", []):
                pair = (entry["before"], entry["after"], entry["condition"])
                differences[pair] = Interval(entry["value"], entry["low"], entry["high"])
            checks = {who: [Check(**answer) for answer in found] for who, found in content.get("checks", {}).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{self.path / name} is no report of results ({error!r}); measure again") from error
        if not results:
            raise RunFolderError(f"{self.path / name} has no results; measure again, or delete it")
        context = content.get("context", {})
        # The checkpoint of this folder is named after its objective or after the folder; else it is the last one.
        checkpoints = list(results)
        names = (context.get("settings", {}).get("training", {}).get("objective"), self.name)
        return Report(
            file=name,
            context=context,
            versions=content.get("versions", {}),
            results=results,
            subject=next((name for name in names if name in checkpoints), checkpoints[-1]),
            averages=content.get("averages", {}),
            differences=differences,
            missing=content.get("missing", {}),
            checks=checks,
        )


def portable(value: Any) -> Any:
    """The same JSON value with ``/path/to/NAME`` for every absolute path in it, keys included."""
    if isinstance(value, Mapping):
        return {portable(k): v if str(k).endswith("_bits") else portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        whole = kind(value)
        if whole.is_absolute() and whole.name and not re.search(r"[,;:\n]\s", value):
            return LOCAL + whole.name
    return portable_text(value)


def portable_text(text: str) -> str:
    """``/path/to/NAME`` for every absolute path inside a text."""
    return _PATH.sub(lambda match: LOCAL + match[1], text)
