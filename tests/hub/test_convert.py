"""Converted weights give the logits of a timm-style forward pass written out here; what does not fit is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from hf_nullspace.hub.checkpoint_files import Checkpoint, CheckpointError
from hf_nullspace.hub.convert import normalization, read_labels, timm_image_processor, to_transformers
from hf_nullspace.hub.timm_vit import SIZES, read_architecture
from hf_nullspace.models.preprocessing import Preprocessing
from hf_nullspace.robustness.label_spaces import imagenet_columns
from timm_style import HEADS, IMAGE, MEAN, STD, WIDTH, timm_logits, timm_weights


def converted(weights, labels=None, heads=HEADS):
    kind, _ = read_architecture(weights, heads=heads)
    return to_transformers(weights, kind, labels)


def refused(weights, **more):
    with pytest.raises(CheckpointError) as error:
        converted(weights, **more)
    return str(error.value)


def pixel_values(seed=1, count=3):
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


# ---- the same function


@pytest.mark.parametrize(
    "given",
    [{}, {"qkv_bias": False}, {"classes": 1}, {"classes": 11, "mlp": 96}, {"distilled": True}, {"depth": 5, "patch": 8},
     {"std": 1e-3}],
    ids=str,
)  # fmt: skip
def test_logits_are_those_of_a_plain_timm_forward(given, tmp_path):
    """The last case is inside the reach of the LayerNorm's epsilon: 1e-12 instead of 1e-6 moves its logits."""
    weights = timm_weights(**given)
    model = converted(weights)
    model.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = pixel_values() * (1e-3 if "std" in given else 1)
    expected = timm_logits(weights, images)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert expected.std(dim=0).max() > 0


def test_half_precision_becomes_float32_and_nothing_else_changes():
    half = {key: value.half() for key, value in timm_weights().items()}
    model = converted(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = timm_logits({key: value.float() for key, value in half.items()}, pixel_values())
    torch.testing.assert_close(model(pixel_values()).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_model_shares_no_memory_and_draws_no_random_numbers():
    weights = timm_weights()
    before = torch.get_rng_state()
    model = converted(weights)
    assert torch.equal(torch.get_rng_state(), before)
    for value in weights.values():
        value.fill_(7.0)
    assert not any((parameter == 7.0).all() for parameter in model.parameters())


# ---- heads and names


@pytest.mark.parametrize(
    ("size", "width", "heads"), [(name, width, heads) for name, (width, _, heads) in SIZES.items()]
)
def test_heads_of_the_usual_widths(size, width, heads):
    """Not always width / 64: timm's huge (1280), giant (1408) and gigantic (1664) have 16."""
    kind, source = read_architecture(timm_weights(width=width, depth=1, mlp=8, classes=2))
    assert kind.heads == heads == {"huge": 16, "giant": 16, "gigantic": 16}.get(size, width // 64)
    assert source == f"those of timm's ViT of width {width}; no tensor says it"


def test_heads_that_nobody_says():
    assert "no usual ViT of width 24: give --heads" in refused(timm_weights(), heads=None)
    for heads in (0, -1, 5):
        assert f"heads={heads}: the width 24 is no multiple" in refused(timm_weights(), heads=heads)
    assert read_architecture(timm_weights(), heads=6)[1] == "as given"


def test_a_named_architecture_has_to_be_true():
    tiny = timm_weights(width=192, depth=12, mlp=16, patch=16, image=32)
    kind, source = read_architecture(tiny, name="vit_tiny_patch16_32.augreg_in21k")
    assert (kind.heads, source) == (3, "those of vit_tiny_patch16_32.augreg_in21k")
    for name, message in [
        ("vit_base_patch16_224", r"width 192 \(not 768\), image 32 \(not 224\)"),
        ("vit_tiny_patch8_32", r"they have patch 16 \(not 8\)$"),
        ("deit_tiny_distilled_patch16_32", r"distilled False \(not True\)"),
        ("resnet50", "expected a name such as vit_base_patch16_224"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_architecture(tiny, heads=3, name=name)


# ---- what is refused


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("blocks.1.ls1.gamma", "layer scale"),
        ("blocks.0.gamma_2", "layer scale"),
        ("norm_pre.weight", "LayerNorm before the first block"),
        ("fc_norm.weight", "global average pooling"),
        ("attn_pool.q.weight", "attention pooling"),
        ("patch_embed.norm.weight", "LayerNorm of the patch embedding"),
        ("patch_embed.backbone.stem.weight", "hybrid"),
        ("reg_token", "register tokens"),
        ("pre_logits.fc.weight", "between the CLS token and the head"),
        ("blocks.0.attn.q_norm.weight", "normalises queries or keys"),
        ("blocks.0.attn.norm.weight", "LayerNorm inside a layer"),
        ("blocks.0.attn.q_bias", "BEiT"),
        ("vit.embeddings.cls_token", "is transformers' own"),
        ("mystery.weight", "mystery.weight (24,) is not known"),
        ("blocks.1.attn.qkv.scale", "blocks.1.attn.qkv.scale (24,) is not known"),
    ],
)
def test_what_transformers_cannot_express_is_refused_by_name(key, reason):
    message = refused(timm_weights() | {key: torch.ones(WIDTH)})
    assert key in message
    assert reason in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks.1.mlp.fc1.weight", torch.ones(41, 24), "fc1.weight has the shape (41, 24), expected (40, 24)"),
        ("blocks.1.attn.qkv.weight", torch.ones(71, 24), "qkv.weight has the shape (71, 24), expected (72, 24)"),
        ("head.bias", torch.ones(6), "head.bias has the shape (6,), expected (5,)"),
        ("pos_embed", torch.ones(1, 16, 24), "pos_embed (1, 16, 24): expected square patches, and a square number"),
        ("pos_embed", torch.ones(17, 24), "pos_embed has the shape (17, 24); expected 3 dimensions"),
        ("patch_embed.proj.weight", torch.ones(24, 3, 4, 8), "weight (24, 3, 4, 8) and pos_embed"),
        ("norm.weight", torch.full((24,), torch.nan), "norm.weight holds NaN or infinity"),
        ("norm.weight", torch.ones(24, dtype=torch.int8), "norm.weight holds torch.int8"),
        ("blocks.1.norm2.bias", None, "blocks.1.norm2.bias is missing, expected (24,)"),
        ("blocks.0.attn.qkv.bias", None, "blocks.0.attn.qkv.bias is missing, expected (72,)"),
        ("head.weight", None, "there is no head.weight"),
        ("cls_token", None, "there is no cls_token"),
        ("patch_embed.proj.weight", None, "there is no patch_embed.proj.weight; expected a ViT with timm's names"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_with_both_shapes(key, value, message):
    weights = {name: tensor for name, tensor in (timm_weights() | {key: value}).items() if tensor is not None}
    assert message in refused(weights)


def test_a_missing_layer_is_missed():
    weights = {key: value for key, value in timm_weights(depth=3).items() if not key.startswith("blocks.1.")}
    message = refused(weights)
    assert "blocks.1.attn.qkv.weight is missing" in message
    assert message.endswith("; and 6 more")


@pytest.mark.parametrize(("count", "more"), [(1, ""), (6, ""), (7, "; and 1 more"), (9, "; and 3 more")])
def test_six_problems_are_named_and_the_rest_counted(count, more):
    weights = timm_weights()
    message = refused(weights | {f"blocks.0.unknown{index}": weights["cls_token"] for index in range(count)})
    assert message.count("is not known") == min(count, 6)
    assert message.endswith(f"is not known{more}")


# ---- the image processor


def of_file(mean, std):
    return Checkpoint({}, "state_dict", (), mean, std)


BARE = of_file(None, None)


@pytest.mark.parametrize("top", [1, 255])
def test_normalization_of_the_file_in_either_unit(top):
    stored = of_file(tuple(top * x for x in MEAN), tuple(top * x for x in STD))
    mean, std, source = normalization(stored)
    assert mean == pytest.approx(MEAN)
    assert std == pytest.approx(STD)
    assert source == f"the file (0.mean, 0.std, for pixels in [0, {top}])"
    assert normalization(stored, name="imagenet")[0] == mean
    with pytest.raises(CheckpointError, match=r"mean \(0.485, 0.456, 0.406\) .* but normalization augreg says \(0.5"):
        normalization(stored, name="augreg")
    for other in ((0.5,) * 3, (0.5,)):
        with pytest.raises(CheckpointError, match="but --mean and --std says"):
            normalization(stored, other, other)


@pytest.mark.parametrize(
    ("mean", "std", "top"),
    [((0.5,), (0.5,), 1), ((1.0, 0.0, 0.5), (1.0, 1.0, 0.5), 1), ((0.0,) * 3, (1.0,) * 3, 1),
     ((0.5,) * 3, (2.0,) * 3, 255), ((255.0, 0.0, 1.0), (255.0, 1.5, 2.0), 255), ((127.5,), (127.5,), 255)],
)  # fmt: skip
def test_the_unit_of_a_normalization_is_that_of_its_std(mean, std, top):
    for found in (normalization(BARE, mean, std), normalization(of_file(mean, std))):
        assert found[:2] == (tuple(x / top for x in mean), tuple(x / top for x in std))


def test_normalization_is_never_guessed():
    for half in (BARE, of_file(MEAN, None), of_file(None, STD)):
        with pytest.raises(CheckpointError, match="the file does not say how images are normalised"):
            normalization(half)
    assert normalization(BARE, name="augreg") == ((0.5,) * 3, (0.5,) * 3, "normalization augreg")
    assert normalization(BARE, MEAN, STD) == (MEAN, STD, "--mean and --std")
    for wrong in [{"mean": MEAN}, {"std": STD}, {"mean": MEAN, "std": STD, "name": "augreg"}]:
        with pytest.raises(CheckpointError, match="give --mean and --std, both, or else --normalization"):
            normalization(BARE, **wrong)
    with pytest.raises(CheckpointError, match="unknown normalization 'clip'; expected imagenet or augreg"):
        normalization(BARE, name="clip")
    for mean, std in [(MEAN[:2], STD[:2]), (MEAN, STD[:1]), ((2.0, 0.5, 0.5), STD), (MEAN, (0.2, 60.0, 0.2)),
                      (MEAN, (0.0, 0.2, 0.2)), ((-0.1, 0.4, 0.4), STD), ((float("nan"),) * 3, STD),
                      ((256.0,) * 3, (60.0,) * 3), ((100.0,) * 3, (256.0,) * 3), ((100.0,) * 3, (60.0, 1.0, 60.0)),
                      (MEAN, (float("inf"),) * 3), (MEAN * 2, STD * 2), (MEAN, (-0.1, 0.2, 0.2))]:  # fmt: skip
        with pytest.raises(CheckpointError, match="expected 1 or 3 values each"):
            normalization(BARE, mean, std)


def test_images_are_prepared_as_timm_does(tmp_path):
    """Shorter edge to floor(size / crop_pct), bicubic; the centre; then mean and std. Against Pillow alone."""
    processor = timm_image_processor(16, MEAN, STD, 0.9)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    height, width = int(17 * 40 / 30), 17  # 16 / 0.9 = 17.8
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 16) // 2, (height - 16) // 2
    expected = np.asarray(resized.crop((left, top, left + 16, top + 16))) / 255
    expected = ((expected - MEAN) / STD).transpose(2, 0, 1)
    for made in (processor, loaded):
        np.testing.assert_allclose(made(image, return_tensors="np")["pixel_values"][0], expected, atol=1e-5)
    assert Preprocessing.from_processor(loaded).resize == 17
    with pytest.raises(CheckpointError, match=r"crop_pct=1\.5"):
        timm_image_processor(16, MEAN, STD, 1.5)


# ---- labels


def test_imagenet_labels_are_in_imagenets_order(tmp_path):
    labels = read_labels("imagenet")
    weights = timm_weights(classes=1000)
    converted(weights, labels).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert imagenet_columns(config.id2label) == list(range(1000))
    assert config.id2label[0] == "tench"
    assert "1000 class names for a head of 5 classes" in refused(timm_weights(), labels=labels)


@pytest.mark.parametrize(
    "text", [json.dumps(list("abcde")), json.dumps({str(i): "abcde"[i] for i in (3, 1, 0, 4, 2)}), "a\nb\n\nc\nd\ne\n",
             json.dumps({"id2label": {i: "abcde"[i] for i in range(5)}, "hidden_size": 3})],
)  # fmt: skip
def test_labels_from_a_file(text, tmp_path):
    (tmp_path / "labels").write_text(text)
    model = converted(timm_weights(), read_labels(str(tmp_path / "labels")))
    assert model.config.id2label == dict(enumerate("abcde"))
    assert model.config.label2id["c"] == 2


def test_labels_with_a_gap(tmp_path):
    (tmp_path / "labels.json").write_text('{"0": "a", "2": "c"}')
    with pytest.raises(CheckpointError, match="without a gap"):
        read_labels(str(tmp_path / "labels.json"))
    assert read_labels(None) is None
