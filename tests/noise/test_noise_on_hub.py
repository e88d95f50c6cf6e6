"""Noises and banks as folders and repositories: what is pushed is pulled, and the card shows what it is."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image

from hf_nullspace.core.uploads import UploadError
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.noise.artifact import NoiseProvenance, NullspaceNoise, model_hash, save_noise_bank
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.noise.influence import centred_norm
from hf_nullspace.noise.provenance import provenance_of
from loopback_hub import READ_ONLY
from tiny_models import tiny_model

COMMIT = "c0ffee" * 6 + "abcd"


def make_noise(round=None, seed=0, **provenance):
    known = {"base_model": "org/vit", "revision": COMMIT, "model_sha256": "5" * 64, "epsilon": 0.03, "steps": 123}
    known |= {"influence": 0.0287654, "influence_images": 512, "stopped": "epsilon", "settings": {"learning_rate": 0.1}}
    tensor = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(seed if round is None else round))
    return NullspaceNoise(tensor, (4, 4), NoiseProvenance(**known | {"round": round} | provenance))


def same(ours, theirs):
    return torch.equal(ours.tensor, theirs.tensor) and ours.grid == theirs.grid and ours.provenance == theirs.provenance


def test_a_noise_is_pushed_as_one_commit_and_pulled(hub_here):
    noise = make_noise()
    first = noise.push_to_hub("lab/noise", private=True)
    assert hub_here.history("models", "lab/noise") == ["Upload nullspace noise", "initial commit"]
    assert hub_here.repository("models", "lab/noise").private
    files = hub_here.files("models", "lab/noise")
    assert sorted(files) == ["README.md", "config.json", "noise.png", "nullspace_noise.safetensors"]
    assert json.loads(files["config.json"])["centred_norm"] == pytest.approx(float(centred_norm(noise.tensor)))
    assert same(NullspaceNoise.from_pretrained("lab/noise"), noise)
    second = make_noise(seed=2)
    second.push_to_hub("lab/noise", commit_message="another")
    assert same(NullspaceNoise.from_pretrained("lab/noise"), second)
    assert same(NullspaceNoise.from_pretrained("lab/noise", revision=first.oid), noise)
    noise.push_to_hub("lab/noise", revision="try")
    assert same(NullspaceNoise.from_pretrained("lab/noise", revision="try"), noise)


def test_a_missing_noise_is_an_error(hub_here):
    for load in (NullspaceNoise.from_pretrained, NoiseBank.from_pretrained):
        with pytest.raises(FileNotFoundError, match=r"no noise.* at 'lab/nothing'.*on the Hub"):
            load("lab/nothing")
        with pytest.raises(FileNotFoundError, match=r"no noise.*'a/b/c'"):
            load("a/b/c")
    make_noise().push_to_hub("lab/noise")
    with pytest.raises(FileNotFoundError, match="no-branch"):
        NullspaceNoise.from_pretrained("lab/noise", revision="no-branch")
    with pytest.raises(FileNotFoundError, match="no noises"):
        NoiseBank.from_pretrained("lab/noise")


def test_offline_the_cache_and_folders_go_on_working(hub_here, tmp_path, monkeypatch):
    noise, bank = make_noise(), NoiseBank((make_noise(0), make_noise(1)))
    noise.push_to_hub("lab/noise")
    bank.push_to_hub("lab/noises")
    NullspaceNoise.from_pretrained("lab/noise"), NoiseBank.from_pretrained("lab/noises")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub_here.asked)
    assert same(NullspaceNoise.from_pretrained("lab/noise"), noise)
    assert all(map(same, NoiseBank.from_pretrained("lab/noises"), bank))
    noise.save_pretrained(tmp_path / "one")
    bank.save_pretrained(tmp_path / "bank")
    assert same(NullspaceNoise.from_pretrained(tmp_path / "one"), noise)
    assert all(map(same, NoiseBank.from_pretrained(tmp_path / "bank"), bank))
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE=1"):
        bank.push_to_hub("lab/noises")
    with pytest.raises(FileNotFoundError, match="no noise"):
        NullspaceNoise.from_pretrained("lab/other")
    assert len(hub_here.asked) == asked


def test_a_bank_is_one_repository(hub_here, tmp_path):
    bank = NoiseBank(tuple(make_noise(round, training_step=40 * round) for round in range(3)))
    first = bank.push_to_hub("lab/noises")
    assert len(hub_here.history("models", "lab/noises")) == 2
    again = NoiseBank.from_pretrained("lab/noises")
    assert len(again) == 3
    assert all(same(ours, theirs) for ours, theirs in zip(again, bank, strict=True))
    assert same(again[2], bank[2])
    assert [noise.provenance.round for noise in again[1:]] == [1, 2]
    bank[:2].push_to_hub("lab/noises")
    files = hub_here.files("models", "lab/noises")
    rounds = ["noises/round-000.safetensors", "noises/round-001.safetensors"]
    assert sorted(files) == ["README.md", "config.json", "noises.png", *rounds], "the third is gone"
    assert json.loads(files["config.json"])["count"] == 2
    assert len(NoiseBank.from_pretrained("lab/noises")) == 2
    assert len(NoiseBank.from_pretrained("lab/noises", revision=first.oid)) == 3
    bank.save_pretrained(tmp_path)
    bank[:2].save_pretrained(tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "noises").iterdir())
    assert names == rounds, "a folder that is saved again keeps no older noise"
    card = ModelCard(files["README.md"].decode())
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table[:4]] == [10] * 4, "a head, a rule and two noises of nine cells"
    rows = [line for line in card.text.splitlines() if re.match(r"\| \d", line)]
    assert [row.split(" | ")[1:3] for row in rows] == [["0", "0"], ["1", "40"]]
    assert all("0.02877 | 512" in row and f"{noise.norm:.4g}" in row for row, noise in zip(rows, bank, strict=False))
    assert "![Influence and norm of every noise](noises.png)" in card.text
    assert "Learned in the course of a fine-tuning" in card.text
    assert "5" * 64 in card.text
    NoiseBank((make_noise(0), make_noise(1, model_sha256="6" * 64))).save_pretrained(tmp_path)
    assert "Every noise was learned on weights of its own" in (tmp_path / "README.md").read_text()


def test_a_model_of_the_hub_is_known_by_its_commit(hub_here):
    commit = tiny_model().push_to_hub("lab/model").oid
    known = provenance_of(type(tiny_model()).from_pretrained("lab/model"))
    assert (known.base_model, known.revision) == ("lab/model", commit)
    assert known.model_sha256 == model_hash(tiny_model())
    assert provenance_of(tiny_model(), hashed=False) == NoiseProvenance()


def test_an_interrupted_push_is_an_error_and_can_be_repeated(hub_here):
    noise = make_noise()
    hub_here.fail("POST .*/commit/", status=400)
    with pytest.raises(UploadError) as caught:
        noise.push_to_hub("lab/noise")
    assert "\n" not in str(caught.value)
    assert hub_here.files("models", "lab/noise") == {}
    eval(re.search(r"repeat the upload with (noise\.push_to_hub\(.*\))$", str(caught.value))[1])
    assert same(NullspaceNoise.from_pretrained("lab/noise"), noise)
    with pytest.raises(UploadError, match=r"may not write there.*bank\.push_to_hub\('lab/b'\)"):
        NoiseBank((noise,)).push_to_hub("lab/b", token=READ_ONLY)


def test_the_card_shows_what_the_noise_is(tmp_path):
    noise = make_noise(round=3, training_step=120)
    noise.save_pretrained(tmp_path, repo_id="lab/noise")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/vit"
    assert "[org/vit](https://huggingface.co/org/vit), commit `" + COMMIT in card.text
    for fact in (f"| norm | {noise.norm:.4g} |", "| 0.02877 on 512 held-out images |", "| 123, stopped by: epsilon |"):
        assert fact in card.text
    for fact in ("| epsilon, the threshold | 0.03 |", "| 3, 120 |", "5" * 64, "| `learning_rate` | 0.1 |"):
        assert fact in card.text
    assert "which was not at hand" in card.text
    with Image.open(tmp_path / "noise.png") as picture:
        assert picture.size[0] > 100


@pytest.mark.parametrize(("word", "said"), [("bound", "as long as allowed, and"), ("start", "began inside")])
def test_the_card_marks_a_noise_that_was_not_learned(tmp_path, word, said):
    make_noise(stopped=word).save_pretrained(tmp_path / "one")
    NoiseBank((make_noise(0), make_noise(1, stopped=word))).save_pretrained(tmp_path / "bank")
    assert f"| 123, stopped by: {word}; {word} (1 of 1): {said}" in (tmp_path / "one" / "README.md").read_text()
    assert f"\n{word} (1 of 2): {said}" in (tmp_path / "bank" / "README.md").read_text()


def test_the_four_lines_of_the_card_run(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    noise = make_noise(0, revision=None, model_sha256=model_hash(model))
    noise.save_pretrained(tmp_path / "one")
    NoiseBank((noise,)).save_pretrained(tmp_path / "bank")
    for folder in ("one", "bank"):
        text = (tmp_path / folder / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        code = code.replace("path/to/the/model", str(tmp_path / "model"))
        code = code.replace("path/to/this/folder", str(tmp_path / folder))
        names = {"pixel_values": torch.zeros(1, 3, 16, 16)}
        exec(code, names)
        assert names.get("NoiseBank", NoiseBank) is NoiseBank
        assert not torch.equal(names["logits"], model(names["pixel_values"]).logits)


def test_the_picture_is_the_preimage_in_pixels(tmp_path):
    """A noise that a change of the image makes, whole: its preimage is that change, and nothing of it is left over."""
    model, processor = tiny_model(), make_image_processor(16)
    change = torch.zeros(1, 3, 16, 16)
    change[0, 0, 5, 6] = 0.25
    std = torch.tensor(processor.image_std)[:, None, None]
    zero = torch.zeros_like(change)
    with torch.no_grad():
        embed = model.get_input_embeddings()
        tensor = embed(change / std) - embed(zero)
    noise = NullspaceNoise(tensor, (4, 4), make_noise(model_sha256=None).provenance)
    theta = embed.projection.weight.flatten(1)
    assert torch.linalg.matrix_rank(theta) == len(theta) < theta.shape[1]
    noise.save_pretrained(tmp_path, model=model, image_processor=processor)
    text = (tmp_path / "README.md").read_text()
    nearest = tensor[0].double() @ torch.linalg.pinv(theta.double()).T
    in_pixels = nearest.reshape(16, 3, 4, 4) * std.double()
    assert f"its largest entry is {in_pixels.abs().max():.3g}," in text
    assert "in pixels of [0, 1]" in text
    assert "can cause is 0.0% of the noise's norm" in " ".join(text.split())
    with pytest.raises(ValueError, match="another model"):
        noise.interpolate((2, 2)).save_pretrained(tmp_path, model=tiny_model("swin"))


def test_a_folder_of_this_machine_is_not_published(hub_here, tmp_path):
    noise = make_noise(revision=None, base_model=str(tmp_path / "secret" / "my-vit"))
    noise.push_to_hub("lab/noise")
    NoiseBank((noise,)).push_to_hub("lab/noises")
    for repository in ("lab/noise", "lab/noises"):
        files = hub_here.files("models", repository)
        assert not [name for name, content in files.items() if b"secret" in content]
        assert "my-vit (a local folder)" in files["README.md"].decode()
        assert ModelCard(files["README.md"].decode()).data.base_model is None
    assert NullspaceNoise.from_pretrained("lab/noise").provenance.base_model == "my-vit"


def test_a_model_is_not_overwritten(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for thing in (make_noise(), NoiseBank((make_noise(),))):
        with pytest.raises(ValueError, match="save_beside_model"):
            thing.save_pretrained(tmp_path)
    make_noise().save_beside_model(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert not (tmp_path / "README.md").exists()
    assert same(NullspaceNoise.from_pretrained(tmp_path), make_noise())


def test_older_layouts_are_read(hub_here, tmp_path):
    """Rounds in the folder itself; a noise with nullspace_noise.json; both also as they lie in a model's repository."""
    noises = [make_noise(0), make_noise(1)]
    save_noise_bank(noises, tmp_path / "older")
    save_noise_bank(noises, tmp_path / "hub" / "models" / "lab" / "model" / "noises")
    noises[1].save_beside_model(tmp_path / "hub" / "models" / "lab" / "model")
    for place in (tmp_path / "older", "lab/model"):
        assert all(map(same, NoiseBank.from_pretrained(place), noises))
    assert same(NullspaceNoise.from_pretrained("lab/model"), noises[1])


def test_the_card_marks_what_was_not_recorded(tmp_path):
    bare = replace(make_noise(), provenance=NoiseProvenance())
    bare.save_pretrained(tmp_path / "one")
    NoiseBank((bare,)).save_pretrained(tmp_path / "bank")
    for folder in ("one", "bank"):
        text = Path(tmp_path / folder / "README.md").read_text()
        assert "not recorded" in text
        assert "None" not in text.replace("NoneType", "")
