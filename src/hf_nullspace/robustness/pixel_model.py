"""Pixels in, logits out: the only place where robustness measurements normalise."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PixelModel(nn.Module):
    """An image classifier that takes pixels in [0, 1]: the space that attacks live in. Anything outside is an error.

    Args:
        model: a transformers image classifier (its output has ``.logits``), or any module from ``pixel_values`` of
            shape (B, C, H, W) to logits of shape (B, K).
        mean, std: per channel, as in the image processor.
        columns: the model's logit for each class of the label space, where the model has another order or more classes.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], columns: Sequence[int] | None = None
    ):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels, std has {len(std)}; they must agree")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive in every channel, got {tuple(std)}")
        self.model = model
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.columns = None if columns is None else list(columns)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of shape (B, K) for ``pixels`` of shape (B, C, H, W) in [0, 1].

        The logits are float32 whatever the model computes in (bf16, autocast), and float64 for a float64 model. Raises
        what :func:`check_pixels` raises.
        """
        return self.logits_of(self.outputs(pixels))

    def outputs(self, pixels: Tensor, **kwargs: Any) -> Any:
        """The model's whole output for ``pixels``; ``kwargs`` such as ``output_attentions=True`` go to the model."""
        check_pixels(pixels, channels=len(self.mean))
        pixel_values = (pixels - self.channels(self.mean, pixels)) / self.channels(self.std, pixels)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), pixels.dtype)
        return self.model(pixel_values.to(dtype), **kwargs)

    def logits_of(self, outputs: Any) -> Tensor:
        """Logits (B, K) in float32 (or float64) from the model's output."""
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.columns is None else logits[:, self.columns]

    @staticmethod
    def channels(values: tuple[float, ...], pixels: Tensor) -> Tensor:
        return pixels.new_tensor(values).view(1, -1, 1, 1)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def model_fingerprint(model: PixelModel) -> str:
    """A hash of every weight and buffer, the normalisation, and the order of the logits."""
    digest = hashlib.sha256(repr((model.mean, model.std, model.columns)).encode())
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_pixels(pixels: Tensor, *, channels: int) -> None:
    """Raise unless ``pixels`` is a floating-point batch (B, C, H, W) with every value in [0, 1]."""
    if not pixels.is_floating_point():
        raise TypeError(f"pixels are {pixels.dtype}; expected floating point in [0, 1] (divide 8-bit images by 255)")
    if pixels.dim() != 4 or pixels.shape[1] != channels:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}; expected (batch, {channels}, height, width)")
    if pixels.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(pixels.detach()))
    if not (low >= 0 and high <= 1):  # NaN fails both
        expected = "expected [0, 1] without NaN: pass pixels, the model normalises them; an attack clips its result"
        raise ValueError(f"pixels lie in [{low:.6g}, {high:.6g}]; {expected}")
