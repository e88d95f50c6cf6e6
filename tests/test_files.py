"""A file is whole or not there, on a full disk and under a regular file too."""

import resource
import signal

import pytest

from hf_nullspace.files import write_json, write_whole


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


def test_a_path_under_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        write_json(tmp_path / "file" / "x.json", 1)


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_json(tmp_path / "x.json", 1).stat().st_mode == plain.stat().st_mode
