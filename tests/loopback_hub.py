"""A Hub on this machine, so that tests push to one and pull from it with the real clients and without the network.

    with LoopbackHub(folder) as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache, token=TOKEN))

``folder/datasets/ORG/NAME/`` holds a data set's files, ``folder/models/ORG/NAME/`` a model's: that is a repository with
one commit, read when it is first asked for. What is pushed is kept in memory: ``hub.files("models", "ORG/NAME")``.
``TOKEN`` may write as ``someone`` and as ``lab``. The clients read HF_ENDPOINT when they are imported, so they run in a
process of their own, or under the fixture ``hub_here`` of conftest.py.

``hub.asked`` lists what was asked for. What goes wrong: of files in ``hub.cut`` a download ends after a few bytes;
``hub.fail``, ``hub.cut_upload``, ``hub.lose_answer`` and ``hub.hold`` take a pattern for "METHOD path" and how often.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from loopback_faults import Faults
from loopback_repository import Commit, File, Refused, Repository, is_large

TOKEN, READ_ONLY = "hf_of_someone", "hf_that_may_not_write"
USER, ORGANIZATIONS = "someone", ("lab",)
KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}

NAME = r"([^/]+/[^/]+)"
API = re.compile(rf"/api/(datasets|models|spaces)/{NAME}(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
WRITE = re.compile(rf"/api/(datasets|models|spaces)/{NAME}/(preupload|commit|branch)/([^/]+)")
RESOLVE = re.compile(rf"/(?:(datasets|spaces)/)?{NAME}/resolve/([^/]+)/(.+)")
LARGE = re.compile(rf"/(?:(datasets|spaces)/)?{NAME}\.git/info/lfs/objects/(batch|verify)")
STORAGE = re.compile(r"/storage/([0-9a-f]{64})(?:/(.+))?")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: "LoopbackHub"

    def do_GET(self) -> None:
        self.silent = False
        url = urlsplit(self.path)
        # A branch may have a slash in its name: it comes quoted, and stays so until it is looked up.
        self.query, path = parse_qs(url.query), unquote(url.path.replace("%2F", "%252F"))
        self.server.asked.append(f"{self.command} {unquote(path)}")
        try:
            fault = self.server.fault(f"{self.command} {unquote(path)}")
            if fault is not None and fault.cut_after is not None:
                self.rfile.read(min(fault.cut_after, int(self.headers.get("Content-Length") or fault.cut_after)))
                self.close_connection = True
                return
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault is not None and fault.wait:
                fault.go.wait(60)
            if fault is not None and fault.status is not None:
                raise Refused(fault.status, "something went wrong here")
            self.silent = fault is not None and fault.lose_answer
            self.answer_to(path)
        except Refused as refused:
            self.refuse(refused)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer_to(self, path: str) -> None:
        if path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path == "/api/whoami-v2":
            self.user(must=True)
            organizations = [{"type": "org", "name": name} for name in ORGANIZATIONS]
            self.answer({"type": "user", "name": USER, "orgs": organizations, "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": warnings_of_card(json.loads(self.body)["content"])})
        elif match := WRITE.fullmatch(path):
            kind, name, what, revision = match.groups()
            repository = self.repository(kind, name, write=True)
            getattr(self, what)(repository, unquote(revision))
        elif match := LARGE.fullmatch(path):
            self.repository(match[1] or "models", match[2], write=True)
            getattr(self, match[3])(json.loads(self.body))
        elif match := STORAGE.fullmatch(path):
            if "Authorization" in self.headers:
                raise Refused(400, "a token was shown to the storage")
            self.store(match[1]) if self.command == "PUT" else self.fetch(match[1], match[2] or "")
        elif match := RESOLVE.fullmatch(path):
            self.resolve(self.repository(match[1] or "models", match[2]), unquote(match[3]), match[4])
        elif match := API.fullmatch(path):
            kind, name, what, revision, below = match.groups()
            self.api(self.repository(kind, name), what, unquote(revision or "main"), below or "")
        else:
            raise Refused(404, "EntryNotFound", "EntryNotFound")

    # ---- who asks, and for what

    def user(self, *, must: bool = False) -> str | None:
        """The token, if there is one, is known; ``must``: there has to be one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (TOKEN, READ_ONLY):
            raise Refused(401, "Invalid credentials in Authorization header")
        if must and not token:
            raise Refused(401, "Invalid username or password.")
        return token or None

    def may_write(self, name: str, kind: str) -> None:
        if self.user(must=True) != TOKEN or name.partition("/")[0] not in (USER, *ORGANIZATIONS):
            raise Refused(403, f'You don\'t have the rights to write to {kind} under the namespace "{name}"')

    def repository(self, kind: str, name: str, *, write: bool = False) -> Repository:
        token = self.user()
        repository = self.server.repository(kind, name)
        if repository is None or (repository.private and token is None):
            # The Hub does not tell a stranger which of the two it is.
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(name, kind)
        return repository

    # ---- reading

    def api(self, repository: Repository, what: str | None, revision: str, below: str) -> None:
        commit = repository.at(revision)
        if what == "tree":
            found = commit.tree(below, self.query.get("recursive", [""])[0].lower() == "true")
            if below and not found:
                raise Refused(404, f"{below} does not exist", "EntryNotFound")
            self.answer(found)
        else:
            self.answer(repository.info(commit))

    def resolve(self, repository: Repository, revision: str, name: str) -> None:
        commit = repository.at(revision)
        if (file := commit.files.get(name)) is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.large:
            self.server.stored.setdefault(file.sha256, file.content)
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            place = {"Location": f"{self.server.storage}/storage/{file.sha256}/{name}"}
            return self.send(302, b"", headers | linked | place)
        return self.send_part(file.content, headers, cut=name in self.server.cut)

    def fetch(self, sha256: str, name: str) -> None:
        if (content := self.server.stored.get(sha256)) is None:
            raise Refused(404, "no such object")
        self.send_part(content, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, cut=name in self.server.cut)

    # ---- writing

    def create(self, wanted: dict[str, Any]) -> None:
        self.user(must=True)
        kind = KINDS[wanted.get("type") or "model"]
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self.may_write(name, kind)
        if kind == "spaces" and not wanted.get("sdk"):
            raise Refused(400, "a Space needs an sdk")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        with self.server.lock:
            if self.server.repository(kind, name) is not None:
                message = f"You already created this {kind[:-1]} repo"
                return self.answer({"error": message, "url": url, "name": name}, 409, {"X-Error-Message": message})
            self.server.repositories[kind, name] = Repository.new(kind, name, private)
        return self.answer({"url": url, "name": name})

    def preupload(self, repository: Repository, revision: str) -> None:
        commit, answers = repository.at(revision), []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            there = commit.files.get(file["path"])
            known = {} if there is None else {"oid": there.etag}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        self.answer({"files": answers})

    def batch(self, wanted: dict[str, Any]) -> None:
        prefix = f"{self.server.endpoint}{urlsplit(self.path).path.removesuffix('batch')}"
        objects = []
        for item in wanted["objects"]:
            upload = {"href": f"{self.server.storage}/storage/{item['oid']}"}
            missing = item["oid"] not in self.server.stored
            actions = {"actions": {"upload": upload, "verify": {"href": f"{prefix}verify"}}} if missing else {}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refused(400, "the content does not have the hash that was named")
        self.server.stored[sha256] = self.body
        self.send(200, b"", {"ETag": f'"{sha256}"'})

    def verify(self, wanted: dict[str, Any]) -> None:
        if len(self.server.stored.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "no such object")
        self.answer({})

    def commit(self, repository: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        made = repository.commit(revision, lines, self.server.stored.get)
        prefix = "" if repository.kind == "models" else f"{repository.kind}/"
        url = f"{self.server.endpoint}/{prefix}{repository.name}/commit/{made.sha}"
        self.answer({"success": True, "commitUrl": url, "commitOid": made.sha})

    def branch(self, repository: Repository, name: str) -> None:
        repository.branch(name, (json.loads(self.body) or {}).get("startingPoint") or "main")
        self.answer({})

    # ---- the answer

    def answer(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, why: Refused) -> None:
        code = {"X-Error-Code": why.code} if why.code else {}
        self.answer({"error": why.message}, why.status, {"X-Error-Message": why.message, **code})

    def send_part(self, content: bytes, headers: dict[str, str], *, cut: bool) -> None:
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers, cut=cut)
        return self.send(200, content, headers, cut=cut)

    def send(self, status: int, content: bytes, headers: Mapping[str, str], *, cut: bool = False) -> None:
        if self.silent:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({**headers, "Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:10] if cut else content)
            self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        pass


def warnings_of_card(text: str) -> list[dict[str, str]]:
    """The Hub's check of README.md; refuses what is no YAML or no valid metadata."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if match is None:
        return [{"message": "empty or missing yaml metadata in repo card"}]
    try:
        data = yaml.safe_load(match[1])
        for model in data.get("model-index", []):
            for result in model["results"]:
                assert all((result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]))
                assert all(metric["type"] and "value" in metric for metric in result["metrics"])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, AssertionError) as error:
        raise Refused(400, f"Invalid metadata in README.md: {error!r}") from None
    return []


class LoopbackHub(Faults, ThreadingHTTPServer):
    """Serves ``folder``, and what is pushed, on a free port of 127.0.0.1 while the ``with`` block runs."""

    daemon_threads = True

    def __init__(self, folder: Path):
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), Handler)
        Faults.__init__(self)
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: set[str] = set()
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for fault in self.faults:
            fault.go.set()
        self.shutdown()
        self.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Of large files: for the clients another server, which must not be shown the token."""
        return f"http://localhost:{self.server_port}"

    def environment(self, cache: Path, token: str = "") -> dict[str, str]:
        """What a client's process needs: the place, no way around it, a cache of its own, and its token or none."""
        places = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN_PATH": str(cache / "token")}
        settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        way = {"HF_ENDPOINT": self.endpoint, "NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": token}
        return places | settings | way

    # ---- what is there

    def repository(self, kind: str, name: str) -> Repository | None:
        with self.lock:
            folder = self.folder / kind / name
            if (kind, name) not in self.repositories and folder.is_dir():
                self.repositories[kind, name] = Repository.of_folder(kind, name, folder)
            return self.repositories.get((kind, name))

    def at(self, kind: str, name: str, revision: str = "main") -> Commit:
        repository = self.repository(kind, name)
        assert repository is not None, f"nothing was pushed to {name}"
        return repository.at(revision)

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository by their names, without .gitattributes."""
        found: Mapping[str, File] = self.at(kind, name, revision).files
        return {path: file.content for path, file in found.items() if path != ".gitattributes"}

    def history(self, kind: str, name: str, branch: str = "main") -> list[str]:
        """The titles of the commits, the newest first."""
        repository = self.repository(kind, name)
        return [] if repository is None else repository.history(branch)
