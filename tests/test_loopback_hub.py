"""The loopback Hub, asked by the real client: what it stores, what it refuses, and what it lets go wrong."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loopback_hub import READ_ONLY, TOKEN

WEIGHTS = bytes(range(256)) * 40


def push(hub, files, repo="someone/thing", kind="model", **more):
    api = HfApi(token=TOKEN)
    api.create_repo(repo, repo_type=kind, exist_ok=True, **({"space_sdk": "gradio"} if kind == "space" else {}))
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(repo, operations, commit_message="a push", repo_type=kind, **more)


def status_of(call, *args, **named):
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **named)
    return caught.value.response.status_code


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_what_is_pushed_is_pulled(hub_here, tmp_path, kind):
    files = {"README.md": b"---\nlicense: mit\n---\nText", "model.safetensors": WEIGHTS, "in/a folder.json": b"{}"}
    pushed = push(hub_here, files, kind=kind)
    assert hub_here.files(f"{kind}s", "someone/thing") == files
    assert [file.large for _, file in sorted(hub_here.at(f"{kind}s", "someone/thing").files.items())][-1]
    folder = snapshot_download("someone/thing", repo_type=kind, cache_dir=tmp_path / "fresh")
    assert pushed.oid == os.path.basename(folder)
    for name, content in files.items():
        assert (tmp_path / "fresh" / folder / name).read_bytes() == content
    tree = HfApi().list_repo_tree("someone/thing", repo_type=kind, recursive=True)
    large = {entry.path: entry.lfs.sha256 for entry in tree if getattr(entry, "lfs", None)}
    assert list(large) == ["model.safetensors"]
    info = HfApi().repo_info("someone/thing", repo_type=kind)
    assert (info.sha, info.private) == (pushed.oid, False)
    assert {sibling.rfilename for sibling in info.siblings} == {*files, ".gitattributes"}


def test_commits_and_branches_are_kept(hub_here):
    first = push(hub_here, {"a.txt": b"1", "b.txt": b"b"})
    HfApi().create_branch("someone/thing", branch="other/branch")
    assert push(hub_here, {"a.txt": b"1"}).oid == first.oid, "nothing is new: no commit"
    second = push(hub_here, {"a.txt": b"2"}, parent_commit=first.oid)
    HfApi().create_commit("someone/thing", [CommitOperationDelete("b.txt")], commit_message="less")
    third = push(hub_here, {"a.txt": b"3"}, revision="other/branch")
    for revision, content in (
        (first.oid, "1"),
        (second.oid, "2"),
        ("main", "2"),
        (third.oid, "3"),
        ("other/branch", "3"),
    ):
        with open(hf_hub_download("someone/thing", "a.txt", revision=revision)) as file:
            assert file.read() == content, revision
    assert hub_here.history("models", "someone/thing") == ["less", "a push", "a push", "initial commit"]
    assert set(hub_here.files("models", "someone/thing")) == {"a.txt"}
    assert set(hub_here.files("models", "someone/thing", "other/branch")) == {"a.txt", "b.txt"}
    names = [branch.name for branch in HfApi().list_repo_refs("someone/thing").branches]
    assert names == ["main", "other/branch"]


def test_what_is_not_there(hub_here):
    push(hub_here, {"a.txt": b"1"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("someone/thing", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("someone/thing", "a.txt", revision="no-branch")
    for call in (HfApi().repo_info, HfApi(token=False).repo_info):
        with pytest.raises(RepositoryNotFoundError):
            call("someone/nothing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().create_commit("someone/nothing", [CommitOperationAdd("a", b"a")], commit_message="-")


def test_who_may_do_what(hub_here):
    push(hub_here, {"a.txt": b"1"})
    api, create = HfApi(), HfApi().create_repo
    assert api.whoami()["name"] == "someone"
    assert create("alone") == f"{hub_here.endpoint}/someone/alone"
    assert status_of(create, "someone/thing") == 409
    create("someone/thing", exist_ok=True)
    assert status_of(create, "someone/new", token=False) == 401
    assert status_of(create, "someone/new", token="hf_wrong") == 401
    assert status_of(create, "stranger/new") == 403
    create("lab/new")
    operations = [CommitOperationAdd("a.txt", b"2")]
    for token, status in ((False, 401), ("hf_wrong", 401), (READ_ONLY, 403)):
        call = HfApi(token=token).create_commit
        assert status_of(call, "someone/thing", operations, commit_message="-") == status
    create("someone/secret", private=True)
    assert HfApi().repo_info("someone/secret").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).repo_info("someone/secret")


def test_what_a_commit_is_refused_for(hub_here):
    first = push(hub_here, {"a.txt": b"1"})
    push(hub_here, {"a.txt": b"2"})
    add = [CommitOperationAdd("a.txt", b"3")]
    assert status_of(HfApi().create_commit, "someone/thing", add, commit_message="-", parent_commit=first.oid) == 412
    delete = [CommitOperationAdd("a.txt", b"3"), CommitOperationDelete("nothing")]
    assert status_of(HfApi().create_commit, "someone/thing", delete, commit_message="-") == 404
    assert hub_here.files("models", "someone/thing") == {"a.txt": b"2"}, "all of a commit, or nothing"
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(hub_here, {"README.md": b"---\n: [\n---\n"})
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        push(hub_here, {"README.md": b"no metadata"})


def test_a_failing_server(hub_here):
    commit = r"POST .*/commit/main"
    for pattern, status in (("POST .*/preupload/", 400), (commit, 500)):
        fault = hub_here.fail(pattern, status=status)
        assert status_of(push, hub_here, {"a.txt": b"1"}) == status
        assert fault.came.is_set()
    once = hub_here.fail("POST .*/preupload/")  # here the client tries again by itself
    push(hub_here, {"a.txt": b"1"})
    assert once.came.is_set()
    hub_here.lose_answer(commit)
    with pytest.raises(Exception, match="disconnected"):
        push(hub_here, {"a.txt": b"2"})
    assert hub_here.files("models", "someone/thing") == {"a.txt": b"2"}


def test_a_connection_that_is_cut_while_a_file_is_sent(hub_here):
    """The client tries again by itself; the commit comes after the file is whole."""
    cut = hub_here.cut_upload("PUT /storage/", after=1000)
    push(hub_here, {"model.safetensors": WEIGHTS})
    assert cut.came.is_set()
    assert hub_here.files("models", "someone/thing") == {"model.safetensors": WEIGHTS}
    assert sum(asked.startswith("PUT /storage/") for asked in hub_here.asked) == 2


PUSH = """
from huggingface_hub import CommitOperationAdd, HfApi
HfApi().create_repo("someone/thing", exist_ok=True)
files = [CommitOperationAdd("big.bin", bytes(10_000)), CommitOperationAdd("a.txt", b"1")]
HfApi().create_commit("someone/thing", files, commit_message="a push")
"""


def test_a_client_in_a_process_of_its_own_that_is_killed(hub_here, tmp_path):
    held = hub_here.hold("PUT /storage/")
    command = [sys.executable, "-c", PUSH]
    environment = os.environ | hub_here.environment(tmp_path / "another cache", TOKEN)
    client = subprocess.Popen(command, env=environment)
    assert held.came.wait(60)
    client.kill()
    client.wait()
    held.go.set()
    assert hub_here.files("models", "someone/thing") == {}
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert hub_here.files("models", "someone/thing") == {"big.bin": bytes(10_000), "a.txt": b"1"}
