"""A run's files as they are published: the same, without the paths of this machine."""

import json

import pytest
import torch

from hf_nullspace.cards.staging import linked_copy, published_copy
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise


def test_texts_lose_paths_and_nothing_else(tmp_path):
    source = {"a": [1.5, None, "and/or"], "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.json").write_text(json.dumps(source))
    (tmp_path / "results.md").write_text(f"| of | {tmp_path}/base | 3/255 |\n")
    copy = published_copy(tmp_path / "run.json", tmp_path / "out" / "run.json")
    assert json.loads(copy.read_text()) == source | {"output_dir": "/path/to/run"}
    copy = published_copy(tmp_path / "results.md", tmp_path / "out" / "results.md")
    assert copy.read_text() == "| of | /path/to/base | 3/255 |\n"


def test_noises_keep_the_name_of_a_local_model(tmp_path):
    for base, revision, expected in ((str(tmp_path / "base"), None, "base"), ("org/vit", "c0ffee", "org/vit")):
        noise = NullspaceNoise(torch.ones(1, 4, 3), (2, 2), NoiseProvenance(base_model=base, revision=revision))
        noise.save_beside_model(tmp_path / "run")
        noise.save(tmp_path / "run" / "noises" / "round-000.safetensors")
        for name in ("nullspace_noise.safetensors", "nullspace_noise.json", "noises/round-000.safetensors"):
            copy = published_copy(tmp_path / "run" / name, tmp_path / "out" / name)
            assert str(tmp_path).encode() not in copy.read_bytes()
        for name in ("", "noises/round-000.safetensors"):
            published = NullspaceNoise.from_pretrained(tmp_path / "out" / name)
            assert published.provenance.base_model == expected
            assert torch.equal(published.tensor, noise.tensor)
        assert (
            json.loads((tmp_path / "out" / "nullspace_noise.json").read_text())["provenance"]["base_model"] == expected
        )


def test_weights_are_linked_or_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    copied = published_copy(source, tmp_path / "copied" / "model.safetensors")
    linked = published_copy(source, tmp_path / "linked" / "model.safetensors", linked=True)
    monkeypatch.setattr("os.link", refused)
    on_another_disk = linked_copy(source, tmp_path / "x" / "model.safetensors")
    assert [path.samefile(source) for path in (copied, linked, on_another_disk)] == [False, True, False]
    source.unlink()
    assert {path.read_bytes() for path in (copied, linked, on_another_disk)} == {b"weights"}


def test_what_is_damaged_is_an_error(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError):
        published_copy(tmp_path / "results.json", tmp_path / "out.json")
