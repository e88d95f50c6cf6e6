"""Files that are whole or not there, manifests of sizes and hashes for folders, and one run per folder."""

import errno
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
_SEAL = "sha256_of_the_rest"
_OWNER_NAME = ".lock.json"
_DISK_ERRORS = (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")  # what torch.save says of a disk
_DISK_ERROR_NUMBERS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


class DamagedFileError(ValueError):
    """A file that an earlier run wrote cannot be read; the message names it."""


class NotWrittenError(OSError):
    """The disk is full, or cannot be written for another reason."""


class FolderInUseError(OSError):
    """Another process writes into the folder."""


def write_whole(path: Path | str, write: Callable[[Path], Any]) -> Path:
    """Let ``write(temporary_path)`` write a file, force it to the disk, then give it its name.

    A failure, a kill or power loss leaves an older file untouched.

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
            temporary.chmod(_ordinary_mode())
            _to_disk(temporary)
            temporary.replace(path)
            _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except SafetensorError as error:
        number = _error_number(str(error))
        reason = os.strerror(number) if number else error
        raise OSError(number or errno.EIO, f"cannot write {path}: {reason}") from error
    except FileExistsError as error:
        raise NotADirectoryError(f"cannot write {path}: a folder of its path is a regular file") from error
    except OSError as error:
        if error.filename is None or ".part" in str(error.filename):
            raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise
    return path


def write_text(path: Path | str, text: str) -> Path:
    """``text`` as UTF-8, whole or not at all."""
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any, *, sealed: bool = False) -> Path:
    """``value`` as indented JSON with a final newline; NaN and infinity are an error.

    ``sealed``: a mapping gets the SHA-256 of its content, so that ``read_json`` notices a change.
    """
    if sealed:
        value = {**value, _SEAL: _content_hash(value)}
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """What ``write_json`` wrote, without its seal.

    Raises:
        DamagedFileError: if it is no JSON, or was changed after it was sealed.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: expected JSON ({error})") from error
    if isinstance(value, dict) and _SEAL in value and value.pop(_SEAL) != _content_hash(value):
        raise DamagedFileError(f"{path} is damaged: its content is not what was written")
    return value


def make_lasting(folder: Path | str, *, below: bool = False) -> None:
    """Force the files that a library wrote into a folder, and their names, to the disk; ``below``: subfolders, too.

    Files of safetensors 0.8, which only their owner can read, get the permissions of an ordinary file.
    """
    folder = Path(folder)
    paths = _files(folder) if below else [path for path in folder.iterdir() if path.is_file()]
    for path in paths:
        if path.suffix == ".safetensors":
            path.chmod(_ordinary_mode())
        _to_disk(path)
    for path in {path.parent for path in paths} | {folder.parent}:
        _to_disk(path)


@contextmanager
def one_clear_error(folder: Path | str) -> Iterator[None]:
    """Turn what several libraries raise when a disk is full, or cannot be written, into one error.

    Raises:
        NotWrittenError: naming the folder, the cause, and how to go on.
    """
    try:
        yield
    except NotWrittenError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError):  # the Hub's errors are OSErrors, too
            number = error.errno
            of_the_disk = isinstance(error, _DISK_ERRORS) or number in _DISK_ERROR_NUMBERS
        else:
            number = _error_number(line)
            of_the_disk = isinstance(error, SafetensorError) or any(word in line for word in _TORCH_SAVE)
        if not of_the_disk:
            raise
        reason = line if number is None else os.strerror(number)
        raise NotWrittenError(
            number or errno.EIO,
            f"could not write {folder} ({reason}). Check the disk's free space and permissions, then start again: a "
            "recipe goes on from its last whole checkpoint by itself, your own script with resume_from_checkpoint=True",
        ) from error


def _error_number(message: str) -> int | None:
    """The errno in a message of safetensors; torch gives none, and a full disk is the usual cause."""
    if found := re.search(r"os error (\d+)", message):
        return int(found[1])
    return errno.ENOSPC if "unexpected pos" in message or "iostream error" in message else None


def sha256(path: Path | str) -> str:
    """Of a file, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_and_hash(path: Path) -> dict[str, Any]:
    """Of one file, in bytes and as SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: Path | str) -> None:
    """Force all files of a folder to the disk, then list their sizes and SHA-256 in ``manifest.json``."""
    folder = Path(folder)
    make_lasting(folder, below=True)
    files = {path.relative_to(folder).as_posix(): size_and_hash(path) for path in _files(folder)}
    write_json(folder / MANIFEST_NAME, files)


def damaged_files(folder: Path | str, listed: Mapping[str, Any] | None = None) -> list[str]:
    """Which files of ``listed``, or of the manifest, are not there as they were written, in words.

    Raises:
        OSError, DamagedFileError: if there is no manifest, or it cannot be read.
    """
    folder = Path(folder)
    damaged = []
    for name, written in (read_json(folder / MANIFEST_NAME) if listed is None else listed).items():
        path = folder / name
        if not path.is_file():
            damaged.append(name)
        elif (size := path.stat().st_size) != written["bytes"]:
            damaged.append(f"a whole {name} ({size:,} of {written['bytes']:,} bytes)")
        elif size_and_hash(path) != written:
            damaged.append(f"an unchanged {name} (its SHA-256 is another)")
    return damaged


def remove_leftovers(folder: Path | str) -> None:
    """Delete temporary files that killed processes left below ``folder``, not in folders with locks of their own."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(place, name) / LOCK_NAME).exists()]
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                Path(place, name).unlink(missing_ok=True)


@contextmanager
def only_run_in(folder: Path | str, *, wait: float = 15) -> Iterator[None]:
    """Hold the folder's lock, as rank 0 alone: no second run writes there. Leftovers of killed runs are deleted.

    The folder is made if it is not there, and deleted again if nothing was written. ``wait`` is in seconds: the workers
    of a process that died may take a while to end.

    Raises:
        FolderInUseError: naming the process and its host, if the lock is still held after ``wait``.
        OSError: if the folder cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"cannot write into {folder}: it is a file, expected a folder") from None
    owner = folder / _OWNER_NAME
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_described(owner)}. Wait until it ends, stop it, or choose another folder"
        ) from None
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(owner, {"process": os.getpid(), "host": socket.gethostname(), "started": started})
        remove_leftovers(folder)
        yield
    finally:
        owner.unlink(missing_ok=True)
        if new and [path.name for path in folder.iterdir()] == [LOCK_NAME]:
            (folder / LOCK_NAME).unlink()  # filelock gives nobody a lock on a file that is gone
            with suppress(OSError):  # another process may use a folder above
                for path in new:
                    path.rmdir()
        lock.release()


def _described(owner: Path) -> str:
    try:
        held = read_json(owner)
        return f"process {held['process']} on {held['host']}, started {held['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)


def _content_hash(value: Any) -> str:
    """The same for the value and for what JSON makes of it."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _to_disk(path: Path) -> None:
    """fsync of a file, or of a folder: then the names in it are on the disk, too."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ordinary_mode() -> int:
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current
