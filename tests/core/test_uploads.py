"""Uploads of a folder: one commit or none, and one line that says what to do when it fails."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from hf_nullspace.core import uploads
from hf_nullspace.core.uploads import UploadError, check_ready, files_to_push, left_behind, push_folder
from loopback_hub import READ_ONLY, TOKEN

FILES = {"README.md": b"---\nlicense: mit\n---\n", "model.safetensors": bytes(9000), "in/notes.json": b"{}"}
COMMIT = "POST /api/models/someone/thing/commit/main"


@pytest.fixture(autouse=True)
def one_more_attempt(monkeypatch):
    monkeypatch.setattr(uploads, "WAITS", (0.0,))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "local", FILES)


def write(place, files):
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def error_of(folder, repo="someone/thing", **more):
    with pytest.raises(UploadError) as caught:
        push_folder(folder, repo, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{folder} is whole on this disk; repeat the upload with " in message
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == FILES
    return message


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_a_folder_is_one_commit(hub_here, folder, tmp_path, kind):
    sdk = "gradio" if kind == "space" else None
    pushed = push_folder(folder, "lab/thing", repo_type=kind, space_sdk=sdk, private=True, commit_message="all of it")
    assert hub_here.history(f"{kind}s", "lab/thing") == ["all of it", "initial commit"]
    assert hub_here.repository(f"{kind}s", "lab/thing").private
    fresh = Path(snapshot_download("lab/thing", repo_type=kind, cache_dir=tmp_path / "fresh", revision=pushed.oid))
    assert {name: (fresh / name).read_bytes() for name in FILES} == FILES
    assert push_folder(folder, "lab/thing", repo_type=kind, space_sdk=sdk).oid == pushed.oid, "nothing new, no commit"


def test_what_is_pushed_and_what_is_not(hub_here, tmp_path):
    local = {"a.txt": b"", "_b/c": b"", "in/checkpoint-3/d": b"", ".cache/e": b"", ".git/f": b"", "noises/1": b"1"}
    write(tmp_path / "local", local)
    assert files_to_push(tmp_path / "local", ["_*", "*/checkpoint-*"]) == ["a.txt", "noises/1"]
    push_folder(tmp_path / "local", "thing", ignore=["_*", "in/*"], revision="try/2")
    assert hub_here.files("models", "someone/thing") == {}
    assert hub_here.files("models", "someone/thing", "try/2") == {"a.txt": b"", "noises/1": b"1"}
    push_folder(write(tmp_path / "older", {"noises/1": b"", "noises/2": b"", "other": b""}), "someone/thing")
    push_folder(tmp_path / "local", "thing", ignore=["_*", "in/*"], replace=["noises/*"])
    assert hub_here.files("models", "someone/thing") == {"a.txt": b"", "noises/1": b"1", "other": b""}
    assert len(hub_here.history("models", "someone/thing")) == 3
    with pytest.raises(FileNotFoundError, match="nothing to push"):
        push_folder(tmp_path / "local", "someone/thing", ignore=["*"])


def test_links_that_lead_out_are_never_followed(hub_here, tmp_path):
    write(tmp_path, {"outside/secret": b"1", "local/a/weights": b"2", "local/.env": b"3"})
    local = tmp_path / "local"
    links = {"inside": local / "a" / "weights", "out": tmp_path / "outside" / "secret", "up": tmp_path / "outside",
             "relative": "../outside/secret", "broken": "nowhere", "../linked": local}  # fmt: skip
    for name, target in links.items():
        (local / name).symlink_to(target)
    for folder in (local, tmp_path / "linked"):
        assert files_to_push(folder, [".env"]) == ["a/weights", "inside"]
        assert left_behind(folder, [".env"]) == ["broken", "out", "relative", "up"]
        assert left_behind(folder, ["o*"], ["a/*"]) == [".env", "broken", "inside", "relative", "up"]
    push_folder(local, "someone/thing", ignore=[".env"])
    assert hub_here.files("models", "someone/thing") == {"a/weights": b"2", "inside": b"2"}


def test_a_star_in_a_list_matches_no_slash(tmp_path):
    names = ("model-1.safetensors", "model-1/x.safetensors", "in/model-1.safetensors", "noises/round-1", "noises/a/b")
    write(tmp_path, dict.fromkeys(names, b""))
    assert files_to_push(tmp_path, only=["model*.safetensors", "noises/*"]) == ["model-1.safetensors", "noises/round-1"]


def test_a_wrong_token_and_nothing_to_push_with(hub_here, folder, monkeypatch):
    assert "does not know the token (401)" in error_of(folder, token="hf_wrong")
    assert "may not write there (403)" in error_of(folder, token=READ_ONLY)
    assert "use one of a member of 'stranger'" in error_of(folder, "stranger/thing")
    assert "no repository's name" in error_of(folder, "a/b/c")
    asked = len(hub_here.asked)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE=1" in error_of(folder)
    with monkeypatch.context() as without:
        without.setenv("HF_TOKEN", "")
        assert "run `hf auth login`, or set HF_TOKEN" in error_of(folder)
        with pytest.raises(UploadError, match="hf auth login"):
            check_ready()
        assert len(hub_here.asked) == asked, "nobody is asked"
        push_folder(folder, "someone/thing", token=TOKEN)


@pytest.mark.parametrize("fault", ["fail", "conflict", "cut_upload", "lose_answer"])
def test_what_passes_is_tried_again(hub_here, folder, caplog, fault):
    if fault == "conflict":
        hub_here.fail(COMMIT, status=409)
    else:
        getattr(hub_here, fault)(COMMIT)
    with caplog.at_level(logging.WARNING):
        push_folder(folder, "someone/thing")
    assert "trying again" in caplog.text
    assert hub_here.files("models", "someone/thing") == FILES
    assert len(hub_here.history("models", "someone/thing")) == 2, "also if the answer to the first was lost"


@pytest.mark.parametrize(
    ("pattern", "status", "reason"),
    [(COMMIT, 500, "the server failed"), (COMMIT, 409, "somebody else"), (COMMIT, 412, "somebody else"),
     (COMMIT, 429, "refused (429"), ("/repos/create", 503, "the server failed"),
     (COMMIT, None, "the connection failed")],
)  # fmt: skip
def test_what_does_not_pass_is_one_line_and_can_be_repeated(hub_here, folder, pattern, status, reason):
    fault = hub_here.fail(pattern, status=status, times=2) if status else hub_here.cut_upload(pattern, times=2)
    assert f"could not push to someone/thing: {reason}" in error_of(folder)
    assert fault.times == 0, "tried twice"
    assert hub_here.repository("models", "someone/thing") is None or hub_here.files("models", "someone/thing") == {}
    push_folder(folder, "someone/thing")
    assert hub_here.files("models", "someone/thing") == FILES


def test_the_storage_that_is_the_default_on_the_hub(hub_here, folder, monkeypatch):
    """Xet: the loopback Hub has none, so a real client fails there."""
    pytest.importorskip("hf_xet", reason="huggingface_hub installs it on some platforms alone")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert "the connection failed (" in error_of(folder)
    assert sum("xet-write-token" in asked for asked in hub_here.asked) == 2
    assert hub_here.files("models", "someone/thing") == {}


def test_what_the_hub_refuses_is_not_tried_again(hub_here, folder):
    refused = hub_here.fail(COMMIT, status=400, times=2)
    assert "refused (400: something went wrong here)" in error_of(folder)
    assert refused.times == 1
    with pytest.raises(ValueError, match="Invalid repo type"):  # what the Hub never saw stays what it is
        push_folder(folder, "someone/thing", repo_type="nothing")
    (folder / "README.md").write_bytes(b"---\n: [\n---\n")
    with pytest.raises(UploadError, match="refuses the card"):
        push_folder(folder, "someone/thing")


def test_a_process_that_is_killed_in_the_middle_and_its_repetition(hub_here, folder, tmp_path):
    """The command that repeats it is the one that the error names."""
    held = hub_here.hold("PUT /storage/")
    code = f"from hf_nullspace.core.uploads import push_folder; push_folder({str(folder)!r}, 'someone/thing')"
    environment = os.environ | hub_here.environment(tmp_path / "another cache", TOKEN)
    client = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert held.came.wait(60)
    client.kill()
    client.wait()
    held.go.set()
    assert hub_here.files("models", "someone/thing") == {}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert hub_here.files("models", "someone/thing") == FILES
