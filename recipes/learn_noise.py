"""Learn one nullspace noise, or a bank of them, for any image classifier with a patch embedding, and keep it.

    accelerate launch recipes/learn_noise.py --model_name_or_path M --dataset_name D --output_dir noises/M
    accelerate launch recipes/learn_noise.py --model_name_or_path M --dataset_name D --count 10 --epsilon 0.03
    accelerate launch recipes/learn_noise.py --model_name_or_path M --dataset_name D --epsilon none --norm_weight 1.0
    accelerate launch recipes/learn_noise.py --model_name_or_path M --dataset_name D --count 10 --push_to_hub ORG/NAME

Writes to --output_dir: nullspace_noise.safetensors with config.json and a card (one noise) or round-000.safetensors ...
(a bank), history.json and history.png. The third form is the exploratory one of equation 6. A bank that was interrupted
goes on, and so does a push that failed: start it again.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import DamagedFileError, only_run_in, read_json, write_json
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.core.settings import check_numbers, check_output_dir
from hf_nullspace.core.uploads import check_ready
from hf_nullspace.data.image_set import collate
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.artifact import (
    WEIGHTS_NAME,
    NullspaceNoise,
    bank_file_name,
    check_own_folder,
    provenance_of,
)
from hf_nullspace.noise.bank import NoiseBank
from hf_nullspace.noise.boundary import BoundarySettings, follow_boundary
from hf_nullspace.noise.pictures import plot_history
from hf_nullspace.training.loading import DataArguments, ModelArguments, load_classifier, load_rows, training_images
from hf_nullspace.training.noise_stream import noise_stream, own_randomness
from hf_nullspace.training.rounds import noise_progress
from hf_nullspace.training.run_settings import SETTINGS_NAME, check_folder, claim_folder

HISTORY_NAME = "history.json"
SEAL = "sha256"
"""In an entry of the history: of the rest of it, and of the noise's file."""
WRITTEN = (
    "round-*.safetensors",
    WEIGHTS_NAME,
    "config.json",
    "README.md",
    "noise.png",
    "history.json",
    "history.png",
    SETTINGS_NAME,
)
"""What ``--overwrite true`` deletes."""


@dataclass
class NoiseArguments:
    """How the noises are learned, and where they go. The defaults are those of the fine-tuning's presets."""

    _group_title: ClassVar[str] = "Noise"

    output_dir: str = option("outputs/noise", "Folder for the noises.")
    count: int = option(1, "How many noises to learn, each from a start of its own.")
    learner: str = option("descent", "'descent' (Algorithm 1) or 'boundary' (follows the edge of epsilon).")
    epsilon: str = option("0.03", "Threshold on the influence in (0, 2], or 'none' (eq. 6).")
    noise_limit: float = option(3.0, "A: the noise starts as U(-A, A); boundary: its limit.")
    learning_rate: float | None = option(None, "Learning rate of the noise. Default: 0.1; boundary: 0.4.")
    max_steps: int | None = option(
        None, "T: the most gradient steps of one noise. Default: 3000; boundary: 60, all taken."
    )
    pool_images: int = option(1024, "Boundary: images with clean logits that are kept.")
    weight_decay: float = option(0.0, "AdamW's decay of the noise (the paper: 0.01).")
    loss: str = option("l2", "'l2' (equation 10) or 'squared_l2' (Algorithm 1, line 12).")
    stop_on: str = option("held_out", "Test epsilon on 'held_out' images or one 'minibatch'.")
    on_limit: str = option("use", "After T steps outside epsilon: 'use', 'rescale', 'error'.")
    norm_weight: float = option(0.0, "lambda of equation 6.")
    norm: str = option("centred", "The norm in equation 6: 'centred' or 'raw'.")
    batch_size: int = option(128, "Images per noise step over all processes.")
    held_out_images: int = option(512, "Images on which the influence is measured.")
    chunk_size: int | None = option(None, "At most so many images in the model at once.")
    num_workers: int = option(0, "Processes that decode images.")
    seed: int = option(42, "Seed; noise k is learned from (seed, k).")
    bf16: bool = option(False, "Run the model in bfloat16 autocast; the noise stays float32.")
    use_cpu: bool = option(False, "Do not use a GPU.")
    overwrite: bool = option(False, "Delete earlier noises of other settings.")
    push_to_hub: str | None = option(None, "Upload the noises to ORG/NAME, with their card.")
    private: bool = option(False, "Of a new repository of --push_to_hub.")

    def __post_init__(self) -> None:
        at_least_0, at_least_1 = ("held_out_images", "num_workers"), ("count", "batch_size", "chunk_size")
        ranges = dict.fromkeys(at_least_0, "int [0, inf)") | dict.fromkeys(at_least_1, "int [1, inf)")
        check_numbers(self, ranges | {"seed": "int [0, 4294967295]"})
        check_output_dir(self.output_dir)
        settings = self.settings()  # raises on values out of range
        rescaled = (
            isinstance(settings, BoundarySettings) or "held_out" in settings.stop_on or settings.on_limit == "rescale"
        )
        if settings.epsilon is not None and rescaled and not self.held_out_images:
            raise UsageError("held_out_images=0: expected at least 1: epsilon is tested on them")

    def settings(self) -> NoiseSettings | BoundarySettings:
        """The settings of one noise."""
        if self.learner not in ("descent", "boundary"):
            raise UsageError(f"learner={self.learner!r}: expected 'descent' or 'boundary'")
        try:
            epsilon = None if self.epsilon.lower() == "none" else float(self.epsilon)
        except ValueError:
            raise UsageError(f"epsilon={self.epsilon!r}: expected a number in (0, 2], or none") from None
        rate, steps = (0.4, 60) if self.learner == "boundary" else (0.1, 3000)
        given = asdict(self) | {
            "epsilon": epsilon,
            "learning_rate": rate if self.learning_rate is None else self.learning_rate,
            "max_steps": steps if self.max_steps is None else self.max_steps,
        }
        if self.learner == "descent":
            return NoiseSettings(**{name: given[name] for name in NoiseSettings.__dataclass_fields__})
        if epsilon is None:
            raise UsageError("epsilon=none: a boundary needs an epsilon; the exploratory form is --learner descent")
        shared = {name: given[name] for name in ("noise_limit", "learning_rate", "loss", "pool_images")}
        return BoundarySettings(epsilon=epsilon, steps=given["max_steps"], **shared)


def main() -> None:
    args, model_args, data_args = parse((NoiseArguments, ModelArguments, DataArguments), str(__doc__))
    settings = args.settings()
    if model_args.model_name_or_path is None:
        raise UsageError("no model: pass --model_name_or_path (a Hub id or a folder)")
    if args.push_to_hub:
        check_ready()
    state = PartialState(cpu=args.use_cpu)
    check_own_folder(Path(args.output_dir))
    with only_run_in(args.output_dir):
        learn(args, settings, model_args, data_args, state)


def learn(
    args: NoiseArguments,
    settings: NoiseSettings | BoundarySettings,
    model_args: ModelArguments,
    data_args: DataArguments,
    state: PartialState,
) -> None:
    """Load, learn what is left, publish."""
    output = Path(args.output_dir)

    # Load
    described = {"noise": asdict(args), "model": asdict(model_args), "data": asdict(data_args)}
    if not args.overwrite:
        check_folder(output, described)
    with state.main_process_first():
        rows = load_rows(data_args, data_args.train_split, streaming=data_args.streaming)
    classifier = load_classifier(model_args, rows, lambda text: state.print(text))
    if classifier.labels.new_head:
        raise UsageError("the model's head is not for these classes; a noise is learned on a model that is trained")
    model = classifier.model.to(state.device).eval()
    images: Any = training_images(data_args, rows, classifier, args.seed)
    if not data_args.streaming and args.batch_size > len(images):
        raise UsageError(f"batch_size={args.batch_size}, but there are {len(images)} images; choose at most that many")
    contents = {"weights": str(classifier.weights), "images": images.content_fingerprint()}
    with state.main_process_first():
        claim_folder(output, described, contents, overwrite=args.overwrite, written=WRITTEN, say=state.print)
    known = provenance_of(model)
    pictured = {"model": model, "image_processor": classifier.image_processor}  # a card shows the noise in pixels

    # Learn
    histories = found(output, args.count, state.print)
    state.wait_for_everyone()  # all have looked
    for index in [index for index in range(args.count) if index not in histories]:
        steps = settings.steps if isinstance(settings, BoundarySettings) else settings.max_steps
        title, hidden = f"Noise {index + 1}/{args.count}", not state.is_local_main_process
        bar = noise_progress(title, steps, epsilon=settings.epsilon, hidden=hidden)
        seed = derive_seed(args.seed, index)
        autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16)
        with bar as show, own_randomness(seed), autocast:
            held_out, batches = noise_stream(
                images,
                collate,
                batch_size=args.batch_size,
                held_out_images=args.held_out_images,
                seed=args.seed,
                round=index,
                rank=state.process_index,
                processes=state.num_processes,
                num_workers=args.num_workers,
            )
            options = {
                "seed": seed,
                "held_out": held_out,
                "chunk_size": args.chunk_size,
                "provenance": replace(known, round=index),
                "on_step": show,
            }
            if isinstance(settings, BoundarySettings):
                (noise,), history = follow_boundary(model, batches, settings, **options)
            else:
                noise, history = learn_noise(model, batches, settings, **options)
        histories[index] = {"round": index} | history.summary(noise.tensor)
        if state.is_main_process:
            keep(noise, histories, output, args.count, pictured)
        state.print(describe(noise, histories[index]), flush=True)
    if state.is_main_process:
        if args.count == 1:  # what follows from the noise once more: a file of it may be lost or damaged
            NullspaceNoise.from_pretrained(output).save_pretrained(output, **pictured)
        plot_history([histories[index] for index in range(args.count)], settings.epsilon, output / "history.png")
    state.print(f"Noises are in {output}; load one with NullspaceNoise.from_pretrained({str(output)!r})")
    if args.push_to_hub and state.is_main_process:
        if args.count == 1:
            NullspaceNoise.from_pretrained(output).push_to_hub(
                args.push_to_hub, private=args.private or None, **pictured
            )
        else:
            NoiseBank.from_pretrained(output).push_to_hub(args.push_to_hub, private=args.private or None)
        print(f"Pushed to {args.push_to_hub}", flush=True)


def found(output: Path, count: int, say: Callable[[str], None]) -> dict[int, dict]:
    """The entries of history.json with an intact noise file; damaged or missing ones are reported."""
    path = output / HISTORY_NAME
    try:
        entries = read_json(path) if path.exists() else []
    except DamagedFileError as error:
        say(f"{error}; the noises are learned again")
        return {}
    whole = {}
    for index, entry in enumerate(entries[:count]):
        if entry.get(SEAL) == seal(entry, output / noise_name(index, count)):
            whole[index] = entry
        else:
            say(f"{output / noise_name(index, count)}, or its entry in {HISTORY_NAME}, is damaged; it is learned again")
    return whole


def noise_name(index: int, count: int) -> str:
    return WEIGHTS_NAME if count == 1 else bank_file_name(index)


def seal(entry: dict, noise: Path) -> str | None:
    """A hash of an entry of the history together with its noise; None if that is not there."""
    if not noise.is_file():
        return None
    text = json.dumps({key: value for key, value in entry.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode() + noise.read_bytes()).hexdigest()


def keep(noise: NullspaceNoise, histories: dict[int, dict], output: Path, count: int, pictured: dict) -> None:
    """Write the noise, then the history that says that it is there."""
    index = noise.provenance.round or 0
    path = output / noise_name(index, count)
    if count == 1:
        noise.save_pretrained(output, **pictured)
    else:
        noise.save(path)
    histories[index][SEAL] = seal(histories[index], path)
    write_json(output / HISTORY_NAME, [histories[index] for index in sorted(histories)])


def describe(noise: NullspaceNoise, entry: dict) -> str:
    """One line on what was learned."""
    influence = "not measured" if entry["influence"] is None else f"{entry['influence']:.4f}"
    return (
        f"noise {entry['round']}: stopped by {entry['stopped']} after {entry['noise_steps']} steps, influence "
        f"{influence} on {noise.provenance.influence_images} held-out images, norm {entry['norm']:.2f}, "
        f"centred norm {entry['centred_norm']:.2f}, {entry['seconds']:.1f} s"
    )


if __name__ == "__main__":
    run(main)
