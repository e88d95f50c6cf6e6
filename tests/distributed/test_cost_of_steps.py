"""The numbers of docs/scaling.md that can be counted without a GPU: operations on meta tensors, bytes, limits."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_nullspace.models.frozen import frozen
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.training.config import NullspaceConfig

SIZES = {  # width, layers, heads, image
    "ViT-S/16, 224": (384, 12, 6, 224),
    "ViT-B/16, 224": (768, 12, 12, 224),
    "ViT-B/16, 384": (768, 12, 12, 384),
    "ViT-L/16, 224": (1024, 24, 16, 224),
}
TABLE = Path(__file__).parents[2] / "docs" / "scaling.md"


def vit(name: str) -> ViTForImageClassification:
    width, layers, heads, image = SIZES[name]
    with torch.device("meta"):
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                image_size=image,
                num_labels=1000,
            )
        )


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_messages(name: str) -> None:
    width, _, _, image = SIZES[name]
    floats = (image // 16) ** 2 * width + 3
    parameters = sum(parameter.numel() for parameter in vit(name).parameters())
    row = f"| {name} | {floats:,} | {floats * 4 / 1e6:.2f} MB | {parameters * 4 / 1e6:,.0f} MB |"
    assert row in TABLE.read_text(encoding="utf-8"), row


def test_operations_of_a_noise_step_and_a_training_step() -> None:
    """A backward pass to the noise alone skips the weights' gradients: 3 forward passes, not 4; training takes 6."""
    model = vit("ViT-B/16, 224")
    hook = PatchEmbeddingNoise(model)
    with torch.device("meta"):
        images, noise = torch.empty(2, 3, 224, 224), torch.empty(1, 196, 768, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as noise_step, frozen(model):
        with torch.no_grad():
            clean = model(images).logits
        with hook.adding(noise):
            noisy = model(images).logits
        torch.autograd.grad(torch.linalg.vector_norm(noisy - clean, dim=-1).sum(), [noise])
    with FlopCounterMode(display=False) as training_step:
        with hook.adding(noise.detach(), 2):
            logits = model(torch.cat([images, images])).logits
        logits.sum().backward()
    once = forward.get_total_flops()
    assert once / 2 / 1e9 == pytest.approx(35.1, abs=0.05)  # per image; a multiplication and an addition are two
    assert noise_step.get_total_flops() / once == pytest.approx(3.03, abs=0.01)
    assert training_step.get_total_flops() / once == pytest.approx(5.99, abs=0.01)


def test_256_processes_need_larger_batches_than_the_paper_has() -> None:
    with mock.patch.object(NullspaceConfig, "world_size", 256):
        with pytest.raises(ValueError, match="global_batch_size=128 is no multiple of 256 processes"):
            NullspaceConfig(output_dir="unused", preset="paper")
        with pytest.raises(ValueError, match="noise_batch_size=128 is less than one image per process"):
            NullspaceConfig(output_dir="unused", preset="paper", global_batch_size=256)
        config = NullspaceConfig(output_dir="unused", preset="paper", global_batch_size=256, noise_batch_size=256)
        assert config.per_device_train_batch_size == 1
