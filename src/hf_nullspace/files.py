"""Files that are either whole or not there: written to a temporary name beside the target, then renamed."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path | str, write: Callable[[Path], None]) -> Path:
    """Let ``write(temporary_path)`` write a file, then give it its name; a failure leaves an older file untouched.

    Raises:
        OSError: what failed (a full disk, a file where a folder has to be), with the path that was to be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(descriptor)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"cannot write {path}: a folder of its path is a regular file") from error
    except OSError as error:
        if error.filename is None or ".part" in str(error.filename):
            raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise
    return path


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path | str, value: Any) -> Path:
    """``value`` as indented JSON with a final newline; NaN and infinity are an error, not invalid JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
