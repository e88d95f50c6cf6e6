"""A file is whole or not there, on a full disk and under a regular file too."""

import os
import resource
import signal
import socket
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from hf_nullspace.core.files import (
    DamagedFileError,
    FolderInUseError,
    NotWrittenError,
    damaged_files,
    one_clear_error,
    only_run_in,
    read_json,
    write_json,
    write_manifest,
    write_whole,
)


def test_failure_leaves_the_older_file(tmp_path):
    path = write_json(tmp_path / "a" / "x.json", {"a": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    def write_half(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write_half)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_full_disk_names_the_file(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse to write more, as a full disk does."""
    path = write_json(tmp_path / "x.json", [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*x\.json"):
            write_json(path, list(range(10000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "[\n  1\n]\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_only_errors_of_the_disk_are_reworded(tmp_path):
    def fail(error):
        with one_clear_error(tmp_path / "checkpoint-3"):
            raise error

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory.$"):
        fail(RuntimeError("CUDA out of memory."))
    with pytest.raises(ConnectionError, match=r"^the Hub$"):
        fail(ConnectionError("the Hub"))
    with pytest.raises(
        NotWrittenError, match=r"checkpoint-3 .*No space left.*goes on from its last whole checkpoint"
    ) as told:
        fail(OSError(28, "No space left on device"))
    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
    ):
        with pytest.raises(NotWrittenError) as other:
            fail(error)
        assert (other.value.errno, str(other.value)) == (told.value.errno, str(told.value))


def test_a_full_disk_below_safetensors_names_the_file(tmp_path):
    def fail(path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"cannot write .*noise\.safetensors: No space left on device") as told:
        write_whole(tmp_path / "noise.safetensors", fail)
    assert told.value.errno == 28


def test_a_path_under_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        write_json(tmp_path / "file" / "x.json", 1)


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_json(tmp_path / "x.json", 1).stat().st_mode == plain.stat().st_mode


def test_a_damaged_json_is_named(tmp_path):
    for content in (b"", b'{"a": ', b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"x\.json is damaged: expected JSON"):
            read_json(tmp_path / "x.json")


def test_a_manifest_finds_what_is_damaged(tmp_path):
    folder = tmp_path / "folder"
    write_whole(folder / "below" / "b.bin", lambda path: path.write_bytes(bytes(100)) and None)
    (folder / "a.safetensors").write_bytes(bytes(100))
    (folder / "a.safetensors").chmod(0o600)
    write_manifest(folder)
    assert damaged_files(folder) == []
    assert (folder / "a.safetensors").stat().st_mode == (folder / "below" / "b.bin").stat().st_mode
    (folder / "below" / "b.bin").write_bytes(bytes(99))
    (folder / "a.safetensors").write_bytes(b"1" + bytes(99))
    assert damaged_files(folder) == [
        "an unchanged a.safetensors (its SHA-256 is another)",
        "a whole below/b.bin (99 of 100 bytes)",
    ]
    (folder / "a.safetensors").unlink()
    assert damaged_files(folder)[0] == "a.safetensors"


HOLD = """
import sys
from hf_nullspace.core.files import only_run_in
with only_run_in(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_per_folder_and_a_dead_one_holds_nothing(tmp_path):
    """The lock of a real process: refused by name while it lives, free when it was killed, leftovers gone."""
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        named = rf"is in use by process {holder.pid} on {socket.gethostname()}, started 20"
        with pytest.raises(FolderInUseError, match=named), only_run_in(folder, wait=0.2):
            pass
        (folder / ".x.json.abc.part").write_text("")
        (folder / "other" / ".lock").parent.mkdir()
        (folder / "other" / ".lock").write_text("")
        (folder / "other" / ".y.json.abc.part").write_text("of another run")
    finally:
        holder.kill()
        holder.communicate()
    with only_run_in(folder, wait=0.2):
        assert not (folder / ".x.json.abc.part").exists()
        assert (folder / "other" / ".y.json.abc.part").exists()
        assert read_json(folder / ".lock.json")["process"] == os.getpid()
    with only_run_in(folder, wait=0.2):
        pass


def test_a_folder_that_stays_empty_is_deleted(tmp_path):
    """A recipe that ends on bad input leaves nothing behind."""
    with pytest.raises(ValueError, match="bad input"), only_run_in(tmp_path / "new" / "run", wait=0.2):
        raise ValueError("bad input")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with only_run_in(tmp_path / "empty", wait=0.2):
        pass
    with only_run_in(tmp_path / "new" / "run", wait=0.2):
        write_json(tmp_path / "new" / "run" / "x.json", 1)
    assert {path.name for path in (tmp_path / "new" / "run").iterdir()} == {".lock", "x.json"}
    assert (tmp_path / "empty").is_dir()


def test_other_ranks_leave_the_lock_to_the_first(tmp_path, monkeypatch):
    with only_run_in(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with only_run_in(tmp_path):
            pass
        monkeypatch.delenv("RANK")


def test_a_lock_in_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NotADirectoryError, match=r"cannot write into .*file: it is a file"),
        only_run_in(tmp_path / "file"),
    ):
        pass
