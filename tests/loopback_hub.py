"""A Hub on this machine, so that tests read from one with the real clients and without the network.

    with LoopbackHub(folder) as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache))

``folder/datasets/ORG/NAME/`` holds a data set's files, ``folder/models/ORG/NAME/`` a model's: that is a repository,
with one revision. The clients read HF_ENDPOINT when they are imported, so they run in a process of their own. Reading
only; ``hub.asked`` lists what was asked for. Of files in ``hub.cut`` the connection ends after a few bytes.
"""

import hashlib
import json
import re
import threading
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Repository:
    """The files of one folder, as the Hub describes them."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    @cached_property
    def etags(self) -> dict[str, str]:
        return {name: hashlib.sha1(path.read_bytes()).hexdigest() for name, path in self.files.items()}

    @property
    def sha(self) -> str:
        return hashlib.sha1(json.dumps(self.etags).encode()).hexdigest()

    def info(self) -> dict:
        siblings = [{"rfilename": name} for name in self.files]
        times = {"lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z"}
        return {"_id": self.sha[:24], "id": self.name, "sha": self.sha, "siblings": siblings, **times} | {
            "private": False, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
        }  # fmt: skip

    def entry(self, path: str) -> dict | None:
        """A file or a folder; None if there is neither."""
        if path in self.files:
            size = self.files[path].stat().st_size
            return {"type": "file", "path": path, "size": size, "oid": self.etags[path]}
        inside = any(name.startswith(f"{path}/") for name in self.files)
        return {"type": "directory", "path": path, "size": 0, "oid": self.sha} if inside else None

    def tree(self, below: str, recursive: bool) -> list[dict]:
        start = f"{below}/" if below else ""
        inside = [name.removeprefix(start) for name in self.files if name.startswith(start)]
        parts = {"/".join(name.split("/")[:n]) for name in inside for n in range(1, name.count("/") + 2)}
        chosen = sorted(part for part in parts if recursive or "/" not in part)
        return [entry for part in chosen if (entry := self.entry(start + part))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "LoopbackHub"

    def repository(self, kind: str, name: str) -> Repository | None:
        folder = self.server.folder / kind / name
        return Repository(folder, name) if folder.is_dir() else None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.asked.append(f"{self.command} {path}")
        if match := API.fullmatch(path):
            kind, name, what, revision, below = match.groups()
            self.api(self.repository(kind, name), what, revision, below or "", query)
        elif match := RESOLVE.fullmatch(path):
            kind, name, revision, file = match.groups()
            self.resolve(self.repository(kind or "models", name), revision, file)
        else:
            self.miss("EntryNotFound")

    def api(self, repository: Repository | None, what: str | None, revision: str, below: str, query: dict) -> None:
        if repository is None:
            self.miss("RepoNotFound")
        elif what is not None and revision not in ("main", repository.sha):
            self.miss("RevisionNotFound")
        elif what == "tree":
            found = repository.tree(below, query.get("recursive", [""])[0].lower() == "true")
            self.answer(found) if found else self.miss("EntryNotFound")
        elif what == "paths-info":
            as_json = "json" in self.headers.get("Content-Type", "")
            wanted = json.loads(self.body)["paths"] if as_json else parse_qs(self.body).get("paths", [])
            self.answer([entry for path in wanted if (entry := repository.entry(path))])
        else:
            self.answer(repository.info())

    def resolve(self, repository: Repository | None, revision: str, file: str) -> None:
        if repository is None:
            return self.miss("RepoNotFound")
        if revision not in ("main", repository.sha):
            return self.miss("RevisionNotFound")
        if file not in repository.files:
            return self.miss("EntryNotFound", commit=repository.sha)
        content = repository.files[file].read_bytes()
        headers = {"ETag": f'"{repository.etags[file]}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers, cut=file in self.server.cut)
        return self.send(200, content, headers, cut=file in self.server.cut)

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def miss(self, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self.send(404, b"", headers)

    def send(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:10] if cut else content)
            self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        pass


class LoopbackHub(ThreadingHTTPServer):
    """Serves ``folder`` on a free port of 127.0.0.1 while the ``with`` block runs."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.cut: set[str] = set()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """What a client's process needs: the place, no way around it, and a cache of its own."""
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
        }
        return settings | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
