"""Noises on real disks: what is written is read back, and what is wrong is said."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_nullspace.models.patch_embedding import patch_embedding_noise
from hf_nullspace.noise.artifact import (
    NoiseProvenance,
    NullspaceNoise,
    load_noise_bank,
)
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.noise.provenance import model_hash
from tiny_models import tiny_model


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


def test_a_bank_misses_what_is_lost(tmp_path):
    noises = [make_noise(seed=seed, round=seed) for seed in range(12)]
    NoiseBank(tuple(noises)).save_pretrained(tmp_path)
    folder = tmp_path / "noises"
    again = load_noise_bank(folder)
    assert [noise.provenance.round for noise in again] == list(range(12))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(again, noises, strict=True))
    (folder / "round-011.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has 11 noises, its config\.json says 12: bring back the missing"):
        NoiseBank.from_pretrained(tmp_path)
    (folder / "round-004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"10 noises up to round-010.*no round-004\.safetensors: bring it back"):
        load_noise_bank(folder)


def test_a_grid_that_is_not_square_keeps_its_sides():
    noise = make_noise(grid=(2, 8), features=6)
    assert noise.interpolate((1, 3)).tensor.shape == (1, 3, 6)
    larger = noise.interpolate((3, 8))
    assert larger.grid == (3, 8)
    rows = noise.tensor.reshape(2, 8, 6)
    expected = torch.nn.functional.interpolate(rows.permute(1, 2, 0), size=3, mode="linear", align_corners=False)
    assert larger.tensor.shape == (1, 24, 6)
    columns = larger.tensor.reshape(3, 8, 6)
    torch.testing.assert_close(columns[1], expected.permute(2, 0, 1)[1])  # between two rows: cubic is linear there


def test_a_noise_is_published_without_the_folder_of_its_base_model():
    found = []
    for base, revision in (("/srv/me/vit", None), ("org/vit", "abc"), (None, None), (None, "abc")):
        known = NoiseProvenance(base_model=base, revision=revision)
        found.append(NullspaceNoise(make_noise().tensor, (4, 4), known).without_local_path().provenance.base_model)
    assert found == ["vit", "org/vit", None, None]


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], r"format \[\], expected"),
        ({"shape": None}, "header says None"),
        ({"shape": "?"}, "header says '\\?'"),
        ({"grid": None}, "grid None, expected two numbers"),
        ({"grid": [4]}, r"grid \[4\], expected two numbers"),
        ({"grid": [4.0, 4]}, r"grid \[4\.0, 4\], expected two numbers"),
        ({"grid": [-4, -4]}, "a grid of -4 x -4 patches"),
        ({"grid": ["4", "4"]}, r"grid \['4', '4'\]"),
        ({"provenance": None}, "a provenance None, expected a dictionary"),
        ({"provenance": [1]}, r"a provenance \[1\], expected"),
        ({"provenance": {"base_model": 7}}, "its provenance has base_model=7"),
        ({"provenance": {"settings": "x"}}, "its provenance has settings='x'"),
        ({"provenance": {"influence": "a" * 500}}, "its provenance has influence='a{30}"),
        ("[" * 100_000, "is no noise, or a damaged one"),
        ("{", "is no noise, or a damaged one"),
    ],
)
def test_a_crafted_header_is_refused_in_a_line(tmp_path, changed, message):
    noise = make_noise()
    header = changed if isinstance(changed, str) else json.dumps(changed and noise.config() | changed)
    save_file({"noise": noise.tensor}, tmp_path / "v.safetensors", metadata={"hf_nullspace": header})
    with pytest.raises(ValueError, match=message) as refused:
        NullspaceNoise.load(tmp_path / "v.safetensors")
    assert "v.safetensors is no noise, or a damaged one" in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_a_header_of_a_later_version_is_read_as_far_as_it_is_known(tmp_path):
    noise = make_noise(seed=2, influence=0)
    header = noise.config()
    header["provenance"]["moon"] = "full"
    save_file({"noise": noise.tensor}, tmp_path / "v.safetensors", metadata={"hf_nullspace": json.dumps(header)})
    assert NullspaceNoise.load(tmp_path / "v.safetensors").provenance == noise.provenance


def test_a_noise_on_other_weights_warns_with_both_hashes(tmp_path):
    model, images = tiny_model(), torch.zeros(1, 3, 16, 16)
    noise = make_noise(model_sha256=model_hash(model), training_step=40)
    with patch_embedding_noise(model, noise):
        ours = model(pixel_values=images).logits
    with patch_embedding_noise(model, noise.tensor):
        assert torch.equal(ours, model(pixel_values=images).logits)
    other = tiny_model(seed=1)
    hashes = rf"org/vit after 40 steps.*weights {model_hash(model)[:12]}\).*other weights \({model_hash(other)[:12]}\)"
    with pytest.warns(UserWarning, match=hashes), patch_embedding_noise(other, noise):
        other(pixel_values=images)
    with pytest.warns(UserWarning, match="other weights"):
        noise.save_pretrained(tmp_path, model=other)
    with torch.no_grad():
        model.classifier.bias.add_(1)  # as an optimizer does: the hash that was kept is not that of these
    with pytest.warns(UserWarning, match="other weights"), patch_embedding_noise(model, noise):
        model(pixel_values=images)
    with patch_embedding_noise(other, make_noise()):  # not known what it was learned on
        other(pixel_values=images)
