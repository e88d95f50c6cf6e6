"""What every figure's JSON says besides its numbers: how to get them again."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_nullspace.robustness.records import versions


def envelope(figure: str, *, settings: Mapping[str, Any], protocol: Mapping[str, Any], quoted: Any) -> dict[str, Any]:
    """Figure, command, versions, commit, settings and protocol; ``quoted`` is what the paper says."""
    return {
        "figure": figure,
        "command": shlex.join(["python", "recipes/reproduce.py", *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit(),
        "protocol": dict(protocol),
        "settings": dict(settings),
        "quoted_from_the_paper": quoted,
    }


def commit() -> str | None:
    """The commit of the checkout that this file lies in; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
