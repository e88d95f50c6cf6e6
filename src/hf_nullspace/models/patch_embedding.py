"""The patch embedding of any ViT-like model, and the one persistent hook that adds noise to its output.

The noise v (1, N, D) is added to the output u (B, N, D) of the patch projection, before CLS token and position
embedding (equation 5 of the paper). A forward hook on the module needs no second forward implementation and survives
renames inside the encoder; it is registered once, before the first compiled call, because a compiled model ignores a
hook that is added later.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

# Models whose `get_input_embeddings()` does not answer with the patch embedding, and where it is instead.
_PATCH_EMBEDDING_PATHS = {"CLIPForImageClassification": "vision_model.embeddings.patch_embedding"}


class NotAViTError(ValueError):
    """The model has no patch embedding that this package can find."""


def find_patch_embedding(model: nn.Module) -> nn.Module:
    """The module whose output are the patch embeddings u (B, N, D), or (B, D, h, w) for a bare convolution.

    Works through wrappers that forward attributes (DDP's ``module``, ``torch.compile``'s ``_orig_mod``, PEFT).

    Raises:
        NotAViTError: if there is none, or it does not project patches (no convolution in it).
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if name in _PATCH_EMBEDDING_PATHS:
        try:
            return inner.get_submodule(_PATCH_EMBEDDING_PATHS[name])
        except AttributeError as error:
            raise NotAViTError(_not_a_vit(name)) from error
    try:
        found = cast(Any, inner).get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise NotAViTError(_not_a_vit(name)) from error
    if not isinstance(found, nn.Module) or patch_projection(found) is None:
        raise NotAViTError(_not_a_vit(name))
    return found


def _not_a_vit(name: str) -> str:
    return (
        f"{name} has no patch embedding; the nullspace is defined for ViT-like models "
        "(ViT, DeiT, BEiT, DINOv2, ViTMSN, Swin, SigLIP, CLIP and their kin). "
        "Pass patch_embedding=<the module whose output are the patch embeddings>."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, ``torch.compile`` and PEFT wrappers."""
    for attribute in ("module", "_orig_mod"):
        inner = model._modules.get(attribute)
        if isinstance(inner, nn.Module) and len(model._modules) == 1:
            return unwrap(inner)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return cast(Any, model).get_base_model()
    return model


def patch_projection(patch_embedding: nn.Module) -> nn.Conv2d | None:
    """The convolution that maps patches to features, ``weight`` theta (D, C, r, r); None if patches overlap."""
    first = next((module for module in patch_embedding.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first is not None and first.stride == first.kernel_size else None


class NoiseMode(Enum):
    """Which images of the batch get the noise."""

    OFF = "off"
    ALL = "all"
    SECOND_HALF = "second half"
    LAST_PART = "last part"


@dataclass(frozen=True)
class EmbeddingShape:
    """Shape of the embeddings of one image: N patches of D features, on a grid (h, w) with h * w = N."""

    patches: int
    features: int
    grid: tuple[int, int]


class PatchEmbeddingNoise:
    """A persistent forward hook that adds ``noise`` to the patch embeddings, according to ``mode``.

    The noise is (1, N, D), one for all images, or (b, N, D), one for each of the b images that ``mode`` selects.

    The noise is kept as it is given (float32 in training) and cast to the dtype and device of the embeddings where it
    is added, so that gradients reach it. While the mode is ``OFF`` nothing is touched, bit for bit.
    """

    def __init__(self, model: nn.Module, patch_embedding: nn.Module | None = None) -> None:
        self.module = patch_embedding if patch_embedding is not None else find_patch_embedding(model)
        self.mode = NoiseMode.OFF
        self.parts = 2
        self.noise: Tensor | None = None
        self._handle = self.module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()

    @contextmanager
    def adding(self, noise: Tensor, mode: NoiseMode = NoiseMode.ALL, parts: int = 2) -> Iterator[Self]:
        """Add ``noise`` inside the block: to every image, to the second half, or to the last of ``parts``."""
        before = self.noise, self.mode, self.parts
        self.noise, self.mode, self.parts = noise, mode, parts
        try:
            yield self
        finally:
            self.noise, self.mode, self.parts = before

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.mode is NoiseMode.OFF or self.noise is None:
            return None
        embeddings = output[0] if isinstance(output, tuple) else output
        noisy = _add(embeddings, self.noise, self.mode, self.parts)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def _add(embeddings: Tensor, noise: Tensor, mode: NoiseMode, parts: int) -> Tensor:
    is_map = embeddings.dim() == 4  # (B, D, h, w): a bare convolution
    if is_map:
        expected = (1, embeddings.shape[2] * embeddings.shape[3], embeddings.shape[1])
    else:
        expected = (1, *embeddings.shape[1:])
    if tuple(noise.shape[1:]) != expected[1:]:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not fit patch embeddings that need {expected} "
            "(1, patches, features). It belongs to another model or image size; "
            "NullspaceNoise.interpolate() adapts it to another image size of the same model."
        )
    noise = noise.to(dtype=embeddings.dtype, device=embeddings.device)
    if is_map:
        noise = noise.transpose(1, 2).reshape(len(noise), *embeddings.shape[1:])
    if mode is NoiseMode.ALL:
        return _sum(embeddings, noise)
    if mode is NoiseMode.LAST_PART and embeddings.shape[0] % parts:
        raise ValueError(f"a batch of {embeddings.shape[0]} is not {parts} views of as many images; pass all views")
    if mode is NoiseMode.SECOND_HALF and embeddings.shape[0] % 2:
        raise ValueError(f"a batch of {embeddings.shape[0]} has no second half; pass the clean and the noisy images")
    first = embeddings.shape[0] - embeddings.shape[0] // (parts if mode is NoiseMode.LAST_PART else 2)
    return torch.cat([embeddings[:first], _sum(embeddings[first:], noise)])


def _sum(embeddings: Tensor, noise: Tensor) -> Tensor:
    if len(noise) not in (1, len(embeddings)):
        raise ValueError(f"{len(noise)} noises for {len(embeddings)} images; expected one for all, or one for each")
    return embeddings + noise


class LearnedNoise(Protocol):
    """A noise that knows the weights it was learned on (:class:`~hf_nullspace.noise.artifact.NullspaceNoise`)."""

    @property
    def tensor(self) -> Tensor: ...
    def check_weights(self, model: nn.Module) -> None: ...


@contextmanager
def patch_embedding_noise(
    model: nn.Module, noise: Tensor | LearnedNoise, patch_embedding: nn.Module | None = None
) -> Iterator[nn.Module]:
    """Run ``model`` with ``noise`` on its patch embeddings; leaves no trace, also after an exception.

    ``noise`` is a NullspaceNoise, and a warning is given if it was learned on other weights than the model's; or a
    tensor (1, N, D), of which that is not known. There is a warning, too, if no forward pass inside had the noise.

    Raises:
        NotAViTError: if the model has no patch embedding.
        RuntimeError: if the model is compiled: once it ran, it ignores hooks that are added later.
        ValueError: in the forward pass, if the noise has another shape than the embeddings.
    """
    if not isinstance(noise, Tensor):
        noise.check_weights(model)
        noise = noise.tensor
    hook = PatchEmbeddingNoise(model, patch_embedding)
    name = type(unwrap(model)).__name__
    added: set[bool] = set()
    watch = hook.module.register_forward_hook(lambda *given: added.add(True), prepend=True)
    try:
        if _is_compiled(model, hook.module):
            raise RuntimeError(
                f"{name} is compiled, and a compiled model that ran before ignores a noise: put it on the model that "
                "torch.compile was given (model._orig_mod) and call that one, or load the model again"
            )
        with hook.adding(noise):
            yield model
        if not added:
            warnings.warn(
                f"no forward pass of {name} inside of patch_embedding_noise had the noise: call this model there, and "
                "not a compiled one made of it",
                stacklevel=3,
            )
    finally:
        hook.remove()
        watch.remove()


def _is_compiled(model: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` runs inside a part of ``model`` that ``torch.compile`` or ``model.compile()`` has compiled."""
    parts = (part for part in model.modules() if any(each is module for each in part.modules()))
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in parts)


@torch.no_grad()
def embedding_shape(model: nn.Module, pixel_values: Tensor, patch_embedding: nn.Module | None = None) -> EmbeddingShape:
    """Shape of the patch embeddings for images like ``pixel_values`` (B, C, H, W); only the first image is used.

    Raises:
        NotAViTError: if the model has no patch embedding.
        ValueError: if the images do not fit the model (the message of the model itself).
    """
    module = patch_embedding if patch_embedding is not None else find_patch_embedding(model)
    projection = patch_projection(module)
    if projection is None:
        raise NotAViTError(_not_a_vit(type(unwrap(model)).__name__))
    weight = projection.weight
    image = pixel_values[:1].to(device=weight.device, dtype=weight.dtype)
    sharded = hasattr(weight, "full_tensor")  # FSDP2, which wants its root, the whole model, to be called first
    output = _output_inside(model, module, image) if sharded else module(image)
    embeddings = output[0] if isinstance(output, tuple) else output
    rows, columns = (
        size // kernel for size, kernel in zip(pixel_values.shape[-2:], projection.kernel_size, strict=True)
    )
    if embeddings.dim() == 4:
        features, rows, columns = embeddings.shape[1:]
        return EmbeddingShape(rows * columns, features, (rows, columns))
    patches, features = embeddings.shape[1:]
    if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], tuple):
        rows, columns = output[1]  # Swin pads the image to a multiple of the patch
    if rows * columns != patches:
        raise NotAViTError(
            f"the patch embedding of {type(unwrap(model)).__name__} gives {patches} tokens for a grid of "
            f"{rows} x {columns}; tokens other than patches have to be added after it"
        )
    return EmbeddingShape(patches, features, (rows, columns))


def _output_inside(model: nn.Module, module: nn.Module, pixel_values: Tensor) -> Any:
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(pixel_values=pixel_values)
    finally:
        handle.remove()
    return outputs[0]
