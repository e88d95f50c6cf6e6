"""A classifier from a folder or the Hub: one way to load it, and one line where it cannot be loaded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

HEAD_NAMES = ("classifier", "cls_classifier", "distillation_classifier")
"""What transformers calls the heads of its image classifiers."""


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ModelNotLoadedError(OSError):
    """A checkpoint that is not there or cannot be used; the message is one line that names it."""


class NoHeadError(ModelNotLoadedError):
    """The checkpoint has all weights but those of the head."""


def load_model_config(name: str, revision: str | None = None) -> Any:
    """The config of the checkpoint ``name``: a folder or a Hub id.

    Raises:
        ModelNotLoadedError: if there is none, or transformers does not know its kind.
    """
    with _one_line(name):
        return AutoConfig.from_pretrained(_place(name), revision=revision, trust_remote_code=False)


def load_model(
    name: str, revision: str | None = None, *, config: Any = None, new_head: bool = False, headless: bool = False
) -> PreTrainedModel:
    """The image classifier ``name`` (a folder or a Hub id) on the CPU, with the weights of the checkpoint.

    Nothing in a checkpoint is run: no code of its own, and of pickled weights only tensors are read.

    Args:
        config: instead of the checkpoint's own, for other labels.
        new_head: the head's weights are left as initialised, whatever the checkpoint has.
        headless: a checkpoint without a head will do.

    Raises:
        NoHeadError: if only the head's weights are missing.
        ModelNotLoadedError: if there is no such checkpoint, it is no image classifier that transformers knows, its
            files are damaged, or weights are missing or of another shape.
    """
    with _one_line(name), without_load_report():
        model, found = AutoModelForImageClassification.from_pretrained(
            _place(name),
            revision=revision,
            config=config,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # transformers' own error does not name them
            output_loading_info=True,
        )
        if other := [entry for entry in found["mismatched_keys"] if not (new_head and _of_the_head(entry[0]))]:
            key, theirs, ours = min(other, key=lambda entry: str(entry[0]))
            shapes = f"{key} has the shape {tuple(theirs)}, and its config.json asks for {tuple(ours)}"
            raise ModelNotLoadedError(f"{shapes}; take both from one checkpoint")
        missing = sorted(map(str, found["missing_keys"]))
        if not all(map(_of_the_head, missing)):
            wrong = f"{len(missing)} of its weights are missing, such as {missing[0]}"
            raise ModelNotLoadedError(f"{wrong}; the file is not of a {type(model).__name__}, or not whole")
        if missing and not (new_head or headless):
            raise NoHeadError(
                f"it has no weights for its head ({missing[0]}); name a checkpoint that was trained to classify, or "
                "fine-tune this one first"
            )
    return model


def load_image_processor(name: str, revision: str | None = None) -> Any:
    """The image processor that was saved with the checkpoint ``name``, with the PIL backend.

    Raises:
        ModelNotLoadedError: if there is none, or it is damaged.
    """
    with _one_line(name):
        place = _place(name)
        if Path(place).is_dir() and not any((Path(place) / file).is_file() for file in _PROCESSOR_FILES):
            save = "save it with image_processor.save_pretrained(FOLDER)"
            raise ModelNotLoadedError(f"the folder has no preprocessor_config.json; {save}")
        return AutoImageProcessor.from_pretrained(place, revision=revision, backend="pil", trust_remote_code=False)


def _of_the_head(key: str) -> bool:
    return any(part in HEAD_NAMES for part in str(key).split("."))


def _place(name: str) -> str:
    """The folder or the Hub id, if it can be one."""
    expected = "expected a folder that save_pretrained wrote, or a Hub id such as ORG/NAME"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotLoadedError("it has no config.json; expected a folder that save_pretrained wrote")
        return str(folder)
    if folder.exists():
        raise ModelNotLoadedError(f"it is a file; {expected}")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelNotLoadedError(f"there is no such folder; {expected}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelNotLoadedError(expected) from error
    return name


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights: the caller looks at them itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """What many libraries raise becomes one line that names the model."""
    try:
        yield
    except Exception as error:
        kind = type(error) if isinstance(error, ModelNotLoadedError) else ModelNotLoadedError
        raise kind(f"cannot load the model {name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "custom code" in text:
        return "it needs code of its own, and no code of a checkpoint is run; name a model that transformers knows"
    if text.startswith("Unrecognized configuration class"):
        return "it is no image classifier; name one with a patch embedding, such as a ViT"
    if "does not recognize this architecture" in text:
        return text.partition(" This could be")[0]
    if isinstance(error, UnpicklingError):
        return "its pickled weights hold more than tensors, and nothing in a pickle is run; save it as safetensors"
    if "not a valid JSON file" in text:
        return f"{text.rstrip('.')}: copy or download it again"
    if isinstance(error, OSError):
        return text
    return (
        f"{type(error).__name__}: {text.partition('. ')[0]}; the files are damaged, or not those of one checkpoint: "
        "copy or download them again"
    )
