"""A run ends at the first NaN, with the step and the name of the tensor: what comes after it would be worthless."""

from typing import Any

from torch import Tensor, nn

from hf_nullspace.noise.probe import not_finite_weight

_AGAIN = "start again with a lower learning_rate, or with bf16 instead of fp16"


def check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a weight of ``model`` is NaN or infinite after ``step`` optimizer steps."""
    if (weight := not_finite_weight(model)) is not None:
        raise FloatingPointError(f"optimizer step {step}: the weight {weight} is NaN or infinite: {_AGAIN}")


def check_loss(loss: float, step: int, model: nn.Module, inputs: dict[str, Any] | None = None) -> None:
    """Raise FloatingPointError if ``loss`` is NaN or infinite; it names the input or the weight that is."""
    if abs(loss) < float("inf"):
        return
    poor = [name for name, each in (inputs or {}).items() if isinstance(each, Tensor) and not each.isfinite().all()]
    if poor:
        culprit = f"{poor[0]} of the batch has NaN or infinity: check the images and their preprocessing"
    else:
        weight = not_finite_weight(model)
        culprit = f"the weight {weight} is NaN or infinite" if weight else "the model's logits are NaN or infinite"
        culprit += f": {_AGAIN}"
    raise FloatingPointError(f"optimizer step {step}: the loss is {loss}: {culprit}")
