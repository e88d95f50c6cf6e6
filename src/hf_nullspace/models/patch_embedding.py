"""The patch embedding of any ViT-like model, and the one persistent hook that adds noise to its output.

The noise v (1, N, D) is added to the output u (B, N, D) of the patch projection, before CLS token and position
embedding (equation 5). The hook is registered before the first compiled call: a compiled model ignores a later one.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# Where the patch embedding is, if `get_input_embeddings()` returns another module.
_PATCH_EMBEDDING_PATHS = {"CLIPForImageClassification": "vision_model.embeddings.patch_embedding"}


class NotAViTError(ValueError):
    """The model has no patch embedding that this package can find."""


def find_patch_embedding(model: nn.Module) -> nn.Module:
    """The module that outputs the patch embeddings u (B, N, D), or (B, D, h, w) for a bare convolution.

    Raises:
        NotAViTError: if there is none, or it does not project patches (no convolution in it).
    """
    inner = unwrap(model)
    path = _PATCH_EMBEDDING_PATHS.get(type(inner).__name__)
    try:
        found = inner.get_submodule(path) if path else cast(Any, inner).get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise _not_a_vit(inner) from error
    if not isinstance(found, nn.Module) or patch_projection(found) is None:
        raise _not_a_vit(inner)
    return found


def _not_a_vit(model: nn.Module) -> NotAViTError:
    return NotAViTError(
        f"{type(model).__name__} has no patch embedding; the nullspace is defined for ViT-like models. "
        "Pass patch_embedding=<the module that outputs the patch embeddings>."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, ``torch.compile`` and PEFT wrappers."""
    children = dict(model.named_children())
    for attribute in ("module", "_orig_mod"):
        if children.keys() == {attribute}:
            return unwrap(children[attribute])
    if hasattr(model, "get_base_model"):  # of PEFT, which need not be installed
        return cast(Any, model).get_base_model()
    return model


def model_type(model: nn.Module) -> str | None:
    """What the config of a model of transformers calls its family."""
    inner = unwrap(model)
    return inner.config.model_type if isinstance(inner, PreTrainedModel) else None


def config_of(model: nn.Module) -> Any:
    """The configuration of a transformers model, also inside wrappers; None of another module."""
    return getattr(unwrap(model), "config", None)


def patch_projection(patch_embedding: nn.Module) -> nn.Conv2d | None:
    """The convolution that maps patches to features, ``weight`` theta (D, C, r, r); None if patches overlap."""
    first = next((module for module in patch_embedding.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first is not None and first.stride == first.kernel_size else None


@dataclass(frozen=True)
class EmbeddingShape:
    """Shape of the embeddings of one image: N patches of D features, on a grid (h, w) with h * w = N."""

    patches: int
    features: int
    grid: tuple[int, int]


class PatchEmbeddingNoise:
    """A persistent forward hook that adds a noise to the patch embeddings, of all images or of the last ones.

    The noise is (1, N, D), one for all of them, or (b, N, D), one for each. It is cast to the dtype and device of the
    embeddings where it is added, so that gradients reach it. Without a noise nothing is touched, bit for bit.
    """

    def __init__(self, model: nn.Module, patch_embedding: nn.Module | None = None) -> None:
        self.module = patch_embedding if patch_embedding is not None else find_patch_embedding(model)
        self.noise: Tensor | None = None
        self.parts = 1
        self._handle = self.module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()

    @contextmanager
    def adding(self, noise: Tensor, parts: int = 1) -> Iterator[Self]:
        """Add ``noise`` inside the block: to the last of ``parts`` equal parts of the batch; to all by default."""
        before = self.noise, self.parts
        self.noise, self.parts = noise, parts
        try:
            yield self
        finally:
            self.noise, self.parts = before

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.noise is None:
            return None
        if isinstance(output, tuple):
            return (_add(output[0], self.noise, self.parts), *output[1:])
        return _add(output, self.noise, self.parts)


def _add(embeddings: Tensor, noise: Tensor, parts: int) -> Tensor:
    expected = 1, *patches_and_features(embeddings)
    if noise.shape[1:] != expected[1:]:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not fit patch embeddings that need {expected}: it belongs to "
            "another model, or to another image size, to which NullspaceNoise.interpolate() adapts it"
        )
    if len(embeddings) % parts:
        raise ValueError(f"a batch of {len(embeddings)} is not {parts} views of as many images; pass all views")
    first = len(embeddings) - len(embeddings) // parts
    if len(noise) not in (1, len(embeddings) - first):
        raise ValueError(
            f"{len(noise)} noises for {len(embeddings) - first} images; expected one for all, or one for each"
        )
    noise = noise.to(dtype=embeddings.dtype, device=embeddings.device)
    if embeddings.dim() == 4:
        noise = noise.transpose(1, 2).reshape(len(noise), *embeddings.shape[1:])
    return torch.cat([embeddings[:first], embeddings[first:] + noise]) if first else embeddings + noise


class LearnedNoise(Protocol):
    """A noise that knows the weights it was learned on (:class:`~hf_nullspace.noise.artifact.NullspaceNoise`)."""

    @property
    def tensor(self) -> Tensor: ...
    def check_weights(self, model: nn.Module) -> None: ...


@contextmanager
def patch_embedding_noise(
    model: nn.Module, noise: Tensor | LearnedNoise, patch_embedding: nn.Module | None = None
) -> Iterator[nn.Module]:
    """Run ``model`` with ``noise`` on its patch embeddings inside the block.

    ``noise`` is a NullspaceNoise or a tensor (1, N, D). There is a warning if a NullspaceNoise was learned on other
    weights than the model's, and if no forward pass inside the block had the noise.

    Raises:
        NotAViTError: if the model has no patch embedding.
        RuntimeError: if the model is compiled.
        ValueError: in the forward pass, if the noise has another shape than the embeddings.
    """
    if not isinstance(noise, Tensor):
        noise.check_weights(model)
        noise = noise.tensor
    hook = PatchEmbeddingNoise(model, patch_embedding)
    name = type(unwrap(model)).__name__
    calls: set[bool] = set()
    try:
        if _is_compiled(model, hook.module):
            raise RuntimeError(
                f"{name} is compiled, and a compiled model that ran before ignores a noise: put it on the model that "
                "torch.compile was given (model._orig_mod) and call that one, or load the model again"
            )
        with hook.adding(noise), hook.module.register_forward_hook(lambda *given: calls.add(True), prepend=True):
            yield model
        if not calls:
            warnings.warn(
                f"no forward pass of {name} inside of patch_embedding_noise had the noise: call this model there, and "
                "not one that torch.compile made of it",
                stacklevel=3,
            )
    finally:
        hook.remove()


def _is_compiled(model: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` runs inside a part of ``model`` that ``torch.compile`` or ``model.compile()`` has compiled."""
    parts = (part for part in model.modules() if any(each is module for each in part.modules()))
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in parts)


@contextmanager
def embeddings_inside(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the patch embedding ``module`` gives in every forward pass inside the block."""
    seen: list[Tensor] = []
    with module.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    ):
        yield seen


def patches_and_features(embeddings: Tensor) -> tuple[int, int]:
    """N and D of patch embeddings (B, N, D), or (B, D, h, w) with N = h * w."""
    if embeddings.dim() == 4:
        return embeddings.shape[2] * embeddings.shape[3], embeddings.shape[1]
    return embeddings.shape[1], embeddings.shape[2]


@torch.no_grad()
def patch_embeddings(patch_embedding: nn.Module, pixel_values: Tensor) -> Tensor:
    """The patch embeddings u (B, N, D) of images (B, C, H, W), from the module that :func:`find_patch_embedding` gives.

    Without a gradient, in at least float32.
    """
    output = patch_embedding(pixel_values.to(next(patch_embedding.parameters())))
    embeddings = output[0] if isinstance(output, tuple) else output
    if embeddings.dim() == 4:
        embeddings = embeddings.flatten(2).transpose(1, 2)
    return embeddings.to(torch.promote_types(torch.float32, embeddings.dtype))


@torch.no_grad()
def embedding_shape(model: nn.Module, pixel_values: Tensor, patch_embedding: nn.Module | None = None) -> EmbeddingShape:
    """Shape of the patch embeddings for images like ``pixel_values`` (B, C, H, W); only the first image is used.

    Raises:
        NotAViTError: if the model has no patch embedding, or its patches overlap.
    """
    module = patch_embedding if patch_embedding is not None else find_patch_embedding(model)
    projection = patch_projection(module)
    if projection is None:
        raise _not_a_vit(unwrap(model))
    weight = projection.weight
    image = pixel_values[:1].to(device=weight.device, dtype=weight.dtype)
    with embeddings_inside(module) as seen:
        if isinstance(weight, DTensor):  # FSDP2 wants its root, the whole model, to be called first
            model(pixel_values=image)
        else:
            module(image)
    patches, features = patches_and_features(seen[0])
    sides = [*zip(pixel_values.shape[-2:], projection.kernel_size, strict=True)]
    rows, columns = (side // kernel for side, kernel in sides)
    if rows * columns != patches:  # Swin pads the image to a multiple of the patch
        rows, columns = (math.ceil(side / kernel) for side, kernel in sides)
    if rows * columns != patches:
        raise NotAViTError(
            f"the patch embedding of {type(unwrap(model)).__name__} gives {patches} tokens for a grid of "
            f"{rows} x {columns}; tokens other than patches have to be added after it"
        )
    return EmbeddingShape(patches, features, (rows, columns))
