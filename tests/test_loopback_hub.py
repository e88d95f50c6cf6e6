"""The loopback Hub, asked by the real client: what it stores, what it refuses, and what it lets go wrong."""

import os

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


def push(files, repo="someone/thing", kind="model", **more):
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
    pushed = push(files, kind=kind)
    assert hub_here.files(f"{kind}s", "someone/thing") == files
    folder = snapshot_download("someone/thing", repo_type=kind, cache_dir=tmp_path / "fresh")
    assert pushed.oid == os.path.basename(folder)
    for name, content in files.items():
        assert (tmp_path / "fresh" / folder / name).read_bytes() == content
    tree = HfApi().list_repo_tree("someone/thing", repo_type=kind, recursive=True)
    assert [entry.path for entry in tree if getattr(entry, "lfs", None)] == ["model.safetensors"]
    info = HfApi().repo_info("someone/thing", repo_type=kind)
    assert (info.sha, info.private) == (pushed.oid, False)
    assert {sibling.rfilename for sibling in info.siblings} == {*files, ".gitattributes"}


def test_commits_and_branches_are_kept(hub_here):
    first = push({"a.txt": b"1", "b.txt": b"b"})
    HfApi().create_branch("someone/thing", branch="other/branch")
    assert push({"a.txt": b"1"}).oid == first.oid, "nothing is new: no commit"
    second = push({"a.txt": b"2"})
    HfApi().create_commit("someone/thing", [CommitOperationDelete("b.txt")], commit_message="less")
    third = push({"a.txt": b"3"}, revision="other/branch")
    for revision, content in zip((first.oid, second.oid, "main", third.oid, "other/branch"), "12233", strict=True):
        with open(hf_hub_download("someone/thing", "a.txt", revision=revision)) as file:
            assert file.read() == content, revision
    assert hub_here.history("models", "someone/thing") == ["less", "a push", "a push", "initial commit"]
    assert set(hub_here.files("models", "someone/thing")) == {"a.txt"}
    assert set(hub_here.files("models", "someone/thing", "other/branch")) == {"a.txt", "b.txt"}


def test_what_is_not_there(hub_here):
    push({"a.txt": b"1"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("someone/thing", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("someone/thing", "a.txt", revision="no-branch")
    for api in (HfApi(), HfApi(token=False)):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("someone/nothing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().create_commit("someone/nothing", [CommitOperationAdd("a", b"a")], commit_message="-")


def test_who_may_do_what(hub_here):
    push({"a.txt": b"1"})
    create = HfApi().create_repo
    assert HfApi().whoami()["name"] == "someone"
    assert create("alone") == f"{hub_here.endpoint}/someone/alone"
    assert status_of(create, "someone/thing") == 409
    create("someone/thing", exist_ok=True)
    create("lab/new")
    assert status_of(create, "stranger/new") == 403
    operations = [CommitOperationAdd("a.txt", b"2")]
    for token, status in ((False, 401), ("hf_wrong", 401), (READ_ONLY, 403)):
        api = HfApi(token=token)
        assert status_of(api.create_repo, "someone/new") == status
        assert status_of(api.create_commit, "someone/thing", operations, commit_message="-") == status
    create("someone/secret", private=True)
    assert HfApi().repo_info("someone/secret").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).repo_info("someone/secret")


def test_what_a_commit_is_refused_for(hub_here):
    push({"a.txt": b"1"})
    operations = [CommitOperationAdd("a.txt", b"3"), CommitOperationDelete("nothing")]
    assert status_of(HfApi().create_commit, "someone/thing", operations, commit_message="-") == 404
    assert hub_here.files("models", "someone/thing") == {"a.txt": b"1"}, "all of a commit, or nothing"
    with pytest.raises(ValueError, match="Invalid metadata"):
        push({"README.md": b"---\n: [\n---\n"})
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        push({"README.md": b"no metadata"})


def test_what_goes_wrong_when_it_is_asked_to(hub_here):
    commit = "POST .*/commit/main"
    for pattern, status in (("POST .*/preupload/", 400), (commit, 500)):
        fault = hub_here.fail(pattern, status=status)
        assert status_of(push, {"a.txt": b"1"}) == status
        assert fault.came.is_set()
    hub_here.lose_answer(commit)
    with pytest.raises(Exception, match="disconnected"):
        push({"a.txt": b"2"})
    assert hub_here.files("models", "someone/thing") == {"a.txt": b"2"}
    once = hub_here.fail("POST .*/preupload/")  # here the client tries again by itself
    cut = hub_here.cut_upload("PUT /storage/", after=1000)  # and here; the commit comes after the file is whole
    push({"model.safetensors": WEIGHTS})
    assert once.came.is_set()
    assert cut.came.is_set()
    assert hub_here.files("models", "someone/thing")["model.safetensors"] == WEIGHTS
    assert sum(asked.startswith("PUT /storage/") for asked in hub_here.asked) == 2
