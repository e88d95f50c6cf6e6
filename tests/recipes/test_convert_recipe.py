"""recipes/convert.py on real files: the folder answers as the wrapped timm model does, and bad input is one line."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from recipe_calls import call_recipe
from timm_style import HEADS, MEAN, STD, easyrobust, timm_logits, timm_weights, training_checkpoint

call = partial(call_recipe, "convert")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training checkpoint as EasyRobust saves it, plain weights, and what cannot be converted."""
    folder = tmp_path_factory.mktemp("convert")
    raw, averaged = timm_weights(seed=0), timm_weights(seed=1)
    torch.save(training_checkpoint(easyrobust(raw), easyrobust(averaged)), folder / "model_best.pth.tar")
    save_file(raw, folder / "plain.safetensors")
    torch.save(raw | {"reg_token": torch.ones(1, 4, 24)}, folder / "registers.pth")
    torch.save(raw | {"patch_embed.proj.weight": torch.ones(24, 1, 4, 4)}, folder / "grey.pth")
    torch.save({"model": torch.nn.Linear(2, 2)}, folder / "module.pth")
    (folder / "labels.txt").write_text("zebra\nyak\nxerus\nwombat\nvole\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes").touch()
    return folder


def photograph():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return image.resize((48, 36), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("ema", [False, True])
def test_an_easyrobust_checkpoint_becomes_a_folder(ema, files, tmp_path, capsys):
    words = ["--checkpoint", files / "model_best.pth.tar", "--output_dir", tmp_path / "new" / "vit", "--heads", HEADS]
    call(*words, "--id2label", files / "labels.txt", *(["--ema"] if ema else []))
    said = capsys.readouterr().out
    taken, left = ("state_dict_ema", "state_dict") if ema else ("state_dict", "state_dict_ema")
    for words in (f"model_best.pth.tar: {taken} ({left} left in the file)",
                  "width 24, depth 2, 4 heads (as given), patch 4, images of 16 x 16, 5 classes",
                  "shorter edge to 18, bicubic, centre crop; mean [0.485, 0.456, 0.406]",
                  "from the file (0.mean, 0.std, for pixels in [0, 1])"):  # fmt: skip
        assert words in said

    folder = tmp_path / "new" / "vit"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (tuple(MEAN), tuple(STD))
    pixel_values = processor(photograph(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
    expected = timm_logits(timm_weights(seed=int(ema)), pixel_values)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    found = pipeline("image-classification", model=model, image_processor=processor)(photograph())
    assert found[0]["label"] == ["zebra", "yak", "xerus", "wombat", "vole"][expected.argmax()]

    record = json.loads((folder / "conversion.json").read_text())
    assert record["sha256"] == hashlib.sha256((files / "model_best.pth.tar").read_bytes()).hexdigest()
    assert (record["weights"], record["weights_left_in_the_file"]) == (taken, [left])
    assert record["architecture"]["heads"] == HEADS
    assert str(files) not in (folder / "conversion.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["vit"]
    assert (folder / "model.safetensors").is_file()


def test_weights_alone_with_what_is_said(files, tmp_path, capsys):
    folder = tmp_path / "vit"
    call("--checkpoint", files / "plain.safetensors", "--output_dir", folder, "--heads", HEADS,
         "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6, "--crop_pct", 1)  # fmt: skip
    said = capsys.readouterr().out
    assert "plain.safetensors: the file's tensors\n" in said
    assert "Classes: without names" in said
    processor = AutoImageProcessor.from_pretrained(folder)
    assert [*processor.image_mean, *processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert processor.size["shortest_edge"] == 16
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[4] == "LABEL_4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "{0}/plain.safetensors", "--output_dir", "{0}/full"], "full is there already and is not an"),
        (["--checkpoint", "{0}/plain.safetensors", "--heads", "4"], "does not say how images are normalised"),
        (["--checkpoint", "{0}/registers.pth", "--heads", "4"], "reg_token are register tokens"),
        (["--checkpoint", "{0}/grey.pth", "--heads", "4", "--normalization", "imagenet"], "model takes 1 channels"),
        (["--checkpoint", "{0}/module.pth"], "needs more than tensors: torch.nn.modules.linear.Linear"),
        (["--checkpoint", "{0}/model_best.pth.tar", "--heads", "4", "--normalization", "augreg"], "augreg says"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(words, message, files, tmp_path, capsys):
    words = [word.format(files) for word in words]
    words += [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        call(*words)
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in said
    assert said.count("\n") == 1
    assert sorted(files.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []
