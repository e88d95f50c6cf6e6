"""What the loopback Hub stores: repositories with their commits and branches, and large files by their SHA-256."""

import base64
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

LARGE = (".arrow", ".bin", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


class Refused(Exception):
    """What the Hub does not do, as a status and the headers and text that tell the client why."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def is_large(path: str, size: int) -> bool:
    """Whether the Hub wants a file in large-file storage."""
    return size > 0 and (path.endswith(LARGE) or size > 5_000_000)


@dataclass(frozen=True)
class File:
    """One version of a file."""

    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """What git calls it."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """All files at one moment."""

    files: Mapping[str, File]
    title: str
    parent: "Commit | None" = None

    @cached_property
    def sha(self) -> str:
        names = "".join(f"{path} {file.oid}\n" for path, file in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent.sha if self.parent else ''} {self.title}\n{names}".encode()).hexdigest()

    def entry(self, path: str) -> dict | None:
        """A file or a folder, as the Hub describes it; None if there is neither."""
        if (file := self.files.get(path)) is None:
            inside = any(name.startswith(f"{path}/") for name in self.files)
            return {"type": "directory", "path": path, "size": 0, "oid": self.sha} if inside else None
        size = len(file.content)
        large = {"oid": file.sha256, "size": size, "pointerSize": 130}
        return {"type": "file", "path": path, "size": size, "oid": file.oid} | ({"lfs": large} if file.large else {})

    def tree(self, below: str, recursive: bool) -> list[dict]:
        start = f"{below}/" if below else ""
        inside = [name.removeprefix(start) for name in self.files if name.startswith(start)]
        parts = {"/".join(name.split("/")[:n]) for name in inside for n in range(1, name.count("/") + 2)}
        chosen = sorted(part for part in parts if recursive or "/" not in part)
        return [entry for part in chosen if (entry := self.entry(start + part))]


@dataclass
class Repository:
    """One repository: ``kind`` is "models", "datasets" or "spaces", ``name`` ORG/NAME."""

    kind: str
    name: str
    first: Commit
    private: bool = False
    branches: dict[str, Commit] = field(init=False)
    commits: dict[str, Commit] = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.branches, self.commits = {"main": self.first}, {self.first.sha: self.first}

    @classmethod
    def of_folder(cls, kind: str, name: str, folder: Path) -> "Repository":
        """The files of a folder as the only commit."""
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        contents = {name: path.read_bytes() for name, path in found.items()}
        files = {name: File(content, is_large(name, len(content))) for name, content in contents.items()}
        return cls(kind, name, Commit(files, "a folder"))

    @classmethod
    def new(cls, kind: str, name: str, private: bool) -> "Repository":
        return cls(kind, name, Commit({".gitattributes": File(ATTRIBUTES, False)}, "initial commit"), private)

    def at(self, revision: str) -> Commit:
        """The commit of a branch's name or of a commit's."""
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def branch(self, name: str, start: str) -> None:
        with self.lock:
            if name in self.branches:
                raise Refused(409, f"Reference already exists: refs/heads/{name}")
            self.branches[name] = self.at(start)

    def commit(self, branch: str, lines: list[dict], stored: Callable[[str], bytes | None]) -> Commit:
        """All of ``lines`` (the commit API's) as one new commit, or nothing of it."""
        with self.lock:
            if branch not in self.branches:
                raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            now = self.branches[branch]
            (header,) = [line["value"] for line in lines if line["key"] == "header"]
            files = dict(now.files)
            for line in lines:
                _apply(files, line["key"], line["value"], stored)
            made = Commit(files, header["summary"], now)
            self.branches[branch] = self.commits[made.sha] = made
            return made

    def history(self, branch: str = "main") -> list[str]:
        """The titles of the commits, the newest first."""
        titles, commit = [], self.branches.get(branch)
        while commit is not None:
            titles.append(commit.title)
            commit = commit.parent
        return titles

    def info(self, commit: Commit) -> dict:
        siblings = [{"rfilename": name} for name in commit.files]
        times = {"lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z"}
        return {"_id": commit.sha[:24], "id": self.name, "sha": commit.sha, "siblings": siblings, **times} | {
            "private": self.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
        }  # fmt: skip


def _apply(files: dict[str, File], key: str, value: dict, stored: Callable[[str], bytes | None]) -> None:
    path = value.get("path", "")
    if key == "file":
        if is_large(path, len(content := base64.b64decode(value["content"]))):
            raise Refused(400, f"{path} has to be in large-file storage")
        files[path] = File(content, False)
    elif key == "lfsFile":
        if (content := stored(value["oid"])) is None:
            raise Refused(400, f"{path}: the large-file storage has no object {value['oid']}")
        files[path] = File(content, True)
    elif key == "deletedFile":
        if path not in files:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    elif key != "header":
        raise Refused(400, f"unknown operation {key!r}")
