"""The robustness metric for `evaluate`: where it is installed, and the Space that is published."""

import keyword
import re
from importlib.resources import files
from pathlib import Path

from hf_nullspace.core.files import write_text

MODULE = "robustness"
# What the module takes from the package: NumPy and the standard library are all that these files need.
PARTS = ("scores", "published")
REQUIREMENTS = ("evaluate>=0.4.6", "datasets>=4.0", "numpy>=2.0")
_EXAMPLE = "ORG/robustness"  # in the folder's README


def metric_folder() -> str:
    """The installed folder of the robustness metric, for ``evaluate.load(metric_folder())``; needs no network."""
    return str(files("hf_nullspace") / "metrics" / MODULE)


def write_space(folder: Path | str, repo_id: str) -> list[Path]:
    """Write the metric as a Space for ``repo_id`` into ``folder``, so that whoever loads it needs `evaluate` alone.

    The files of the package that it computes with lie beside it, unchanged. Returns the paths.

    Raises:
        ValueError: if the repository's name cannot be a module's: `evaluate` looks for NAME.py in ORG/NAME.
    """
    name = repo_id.rpartition("/")[2]
    if repo_id.count("/") != 1 or not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"{repo_id!r} cannot hold a metric: `evaluate` imports NAME.py from ORG/NAME, so NAME has to be lower-case "
            "letters, digits and underscores, for example ORG/robustness"
        )
    source, package = Path(metric_folder()), Path(str(files("hf_nullspace.robustness")))
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(source.iterdir()) if path.is_file()}
    texts |= {f"{part}.py": (package / f"{part}.py").read_text(encoding="utf-8") for part in PARTS}
    module = texts.pop(f"{MODULE}.py")
    for part in PARTS:
        module = module.replace(f"from hf_nullspace.robustness.{part} import", f"from .{part} import")
    texts[f"{name}.py"] = module
    texts["app.py"] = texts["app.py"].replace(f"{MODULE}.py", f"{name}.py")
    texts["README.md"] = texts["README.md"].replace(_EXAMPLE, repo_id)
    texts["requirements.txt"] = "".join(f"{line}\n" for line in REQUIREMENTS)
    if more := re.findall(r"^\s*(?:from|import) (hf_nullspace\S*)", module, re.M):
        raise ValueError(f"the metric imports {', '.join(more)}, which the Space would not have: add it to PARTS")
    return [write_text(Path(folder) / file, text) for file, text in sorted(texts.items())]
