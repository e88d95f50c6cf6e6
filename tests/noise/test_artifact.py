"""Noises on real disks: what is written is read back, and what is wrong is said."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_nullspace.models.patch_embedding import EmbeddingShape
from hf_nullspace.noise.artifact import (
    NoiseMismatchError,
    NoiseProvenance,
    NullspaceNoise,
    load_noise_bank,
    save_noise_bank,
)


def make_noise(grid=(4, 4), features=24, seed=0, **provenance):
    tensor = torch.randn(1, grid[0] * grid[1], features, generator=torch.Generator().manual_seed(seed))
    return NullspaceNoise(tensor, grid, NoiseProvenance(base_model="org/vit", epsilon=0.03, **provenance))


@pytest.mark.parametrize("as_file", [True, False])
def test_round_trip(tmp_path, as_file):
    noise = make_noise(seed=1, influence=0.0299, influence_images=512, settings={"learning_rate": 0.1}, round=3)
    path = noise.save(tmp_path / "deep" / "v.safetensors") if as_file else noise.save_beside_model(tmp_path).parent
    again = NullspaceNoise.from_pretrained(path)
    assert torch.equal(again.tensor, noise.tensor)
    assert again.grid == noise.grid
    assert again.provenance == noise.provenance


def test_json_beside_the_tensor_is_for_people(tmp_path):
    noise = make_noise()
    noise.save_beside_model(tmp_path)
    config = json.loads((tmp_path / "nullspace_noise.json").read_text())
    assert config["provenance"]["base_model"] == "org/vit"
    assert config["norm"] == pytest.approx(torch.linalg.vector_norm(noise.tensor).item())
    assert config["centred_norm"] < config["norm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nullspace_noise.json", "nullspace_noise.safetensors"]


def test_equal_noises_are_equal_files(tmp_path):
    files = {make_noise(seed=3).save(tmp_path / f"{index}.safetensors").read_bytes() for index in range(20)}
    assert len(files) == 1


def test_bank(tmp_path):
    noises = [make_noise(seed=seed, round=seed) for seed in range(12)]
    save_noise_bank(noises, tmp_path / "noises")
    again = load_noise_bank(tmp_path / "noises")
    assert [noise.provenance.round for noise in again] == list(range(12))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(again, noises, strict=True))
    with pytest.raises(FileNotFoundError, match="no noises"):
        load_noise_bank(tmp_path)


def test_another_model_says_what_differs():
    noise = make_noise()
    noise.check_fits(EmbeddingShape(16, 24, (4, 4)))
    with pytest.raises(NoiseMismatchError, match=r"learned on org/vit.*24 features per patch, the model has 32"):
        noise.check_fits(EmbeddingShape(16, 32, (4, 4)))
    with pytest.raises(NoiseMismatchError, match=r"4 x 4 patches, the model has 6 x 6; interpolate"):
        noise.check_fits(EmbeddingShape(36, 24, (6, 6)))


def test_interpolation_is_that_of_position_embeddings():
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    embeddings = ViTEmbeddings(ViTConfig(hidden_size=24, image_size=16, patch_size=4))
    noise = make_noise(influence=0.01)
    with torch.no_grad():
        embeddings.position_embeddings[:, 1:] = noise.tensor
        expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 24), 24, 24)[:, 1:]
    larger = noise.interpolate((6, 6))
    torch.testing.assert_close(larger.tensor, expected)
    assert larger.grid == (6, 6)
    assert larger.provenance.influence is None


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no noise at"):
        NullspaceNoise.from_pretrained(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no noise"):
        NullspaceNoise.from_pretrained(tmp_path / "other.safetensors")
    path = make_noise().save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        NullspaceNoise.from_pretrained(path)


@pytest.mark.parametrize(
    ("tensor", "grid", "message"),
    [
        (torch.zeros(16, 24), (4, 4), "shape"),
        (torch.zeros(1, 16, 24), (4, 5), "4 x 5"),
        (torch.full((1, 16, 24), float("nan")), (4, 4), "NaN"),
    ],
)
def test_impossible_noises_are_refused(tensor, grid, message):
    with pytest.raises(ValueError, match=message):
        NullspaceNoise(tensor, grid)
