"""Fine-tune an image classifier with nullspace noise, and measure what it gained and lost.

    accelerate launch recipes/finetune.py                                   (built-in digits, a minute or two)
    accelerate launch recipes/finetune.py --config recipes/configs/cifar10.yaml --dataset_name FOLDER
    accelerate launch recipes/finetune.py --model_name_or_path M --dataset_name D --preset paper
    accelerate launch recipes/finetune.py ... --push_to_hub true --hub_model_id ORG/NAME

Writes to --output_dir: the model and its image processor, the noises, nullspace_history.json, and the measurements
before and after (results.json, .md, .csv, .png). With --interpolate true the model is the part of the way from the
checkpoint to the fine-tuned weights that selection images choose (interpolation.json, .png). A run that was killed goes
on where it was when started again.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from transformers import AutoModelForImageClassification, set_seed

from hf_nullspace import NullspaceConfig, NullspaceTrainer
from hf_nullspace.cards.run_folder import INTERPOLATION_NAME
from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in, read_json
from hf_nullspace.core.settings import check_numbers, fraction
from hf_nullspace.core.text import escape
from hf_nullspace.core.uploads import check_ready
from hf_nullspace.data.image_set import collate
from hf_nullspace.noise.pictures import plot_history
from hf_nullspace.robustness.attacks.gradient import FGSM
from hf_nullspace.robustness.pixel_model import PixelModel
from hf_nullspace.robustness.plans import lacks
from hf_nullspace.robustness.report import terminal_table, verdict, write_report
from hf_nullspace.robustness.suite import Attacked, Clean, Condition, Corrupted, evaluate
from hf_nullspace.training.base_model import BASE_RANGES, train_base_model
from hf_nullspace.training.checkpoints import last_complete_checkpoint
from hf_nullspace.training.interpolation import GRID, Selection, remarks_on
from hf_nullspace.training.loading import (
    DataArguments,
    ModelArguments,
    evaluation_images,
    load_classifier,
    load_rows,
    training_images,
)
from hf_nullspace.training.objectives import check_objective
from hf_nullspace.training.preflight import check_images, disk_space_warning
from hf_nullspace.training.run_settings import check_folder, claim_folder
from hf_nullspace.training.selection import selection_images, selection_rows

KEPT_BYTES = 2**30
"""Test images under all conditions that take less memory are prepared once, for all models."""
DIGITS = Path(__file__).parent / "configs" / "digits.yaml"


RANGES = {"max_eval_images": "int [1, inf)", "max_selection_images": "int [1, inf)", "interpolate_grid": "[0, 1]"}


@dataclass
class FinetuneArguments:
    """What this recipe does beside the fine-tuning itself."""

    _group_title: ClassVar[str] = "Recipe"

    control: bool = option(
        True, "Also fine-tune without noise (same steps, batches, learning rate): what does the noise add?"
    )
    beside: list[str] = option(
        [], "Other objectives to fine-tune with in the same way and to measure beside it, for example nullspace."
    )
    base_epochs: float = option(20, "Small ViT: epochs of its training.")
    base_learning_rate: float = option(2e-3, "Small ViT: learning rate of its training.")
    base_batch_size: int = option(64, "Small ViT: images per step of its training.")
    max_eval_images: int | None = option(2000, "Measure on the first so many test images.")
    fgsm: list[str] = option(["1/255"], "Strengths of the FGSM attack, in pixels of [0, 1], for example 8/255.")
    corruptions: list[str] = option(
        ["gaussian_noise", "contrast", "jpeg_compression"], "Corruptions that are generated to measure on."
    )
    severities: list[int] = option([3, 5], "Severities of the corruptions, 1 to 5.")
    interpolate_grid: list[float] = option(
        list(GRID),
        "--interpolate: the alphas to try, shares of the way from the checkpoint (0) to the fine-tuning (1).",
    )
    selection_split: str | None = option(
        None, "--interpolate: split that alpha is chosen on. Unset: a validation split, or held out of the training."
    )
    max_selection_images: int = option(1000, "--interpolate: choose on at most so many images.")
    overwrite: bool = option(False, "Delete an earlier run with other settings.")

    def __post_init__(self) -> None:
        check_numbers(self, BASE_RANGES | RANGES)
        self.conditions()  # raises on a name or a severity that does not exist
        for objective in self.beside:
            check_objective(objective)

    def conditions(self) -> list[Condition]:
        """What is measured before and after."""
        try:
            attacks = [Attacked(FGSM(fraction(strength))) for strength in self.fgsm]
        except ValueError as error:
            raise UsageError(f"fgsm: {error}") from error
        corrupted = [Corrupted(name, severity) for name in self.corruptions for severity in self.severities]
        conditions = [Clean(), *attacks, *corrupted]
        if len({str(condition) for condition in conditions}) < len(conditions):
            raise UsageError(f"{', '.join(map(str, conditions))}: expected each attack, corruption and severity once")
        return conditions


def main() -> None:
    recipe, model_args, data_args, config = parse(
        (FinetuneArguments, ModelArguments, DataArguments, NullspaceConfig),
        str(__doc__),
        default_config=lambda words: None if any("_name" in word.partition("=")[0] for word in words) else DIGITS,
    )
    if config.push_to_hub:
        check_ready(config.hub_token)
    with only_run_in(str(config.output_dir)):
        run_all(recipe, model_args, data_args, config)


def run_all(
    recipe: FinetuneArguments, model_args: ModelArguments, data_args: DataArguments, config: NullspaceConfig
) -> None:
    """Load, measure, fine-tune, measure what was written, report, publish."""
    state = PartialState()

    def say(text: str) -> None:
        state.print(text, flush=True)

    # Load
    conditions = recipe.conditions()
    output = Path(config.output_dir)
    settings = {key: asdict(part) for key, part in (("recipe", recipe), ("model", model_args), ("data", data_args))}
    settings["training"] = config.to_dict()
    if not recipe.overwrite:
        check_folder(output, settings)
    with state.main_process_first():
        train_rows = load_rows(data_args, data_args.train_split, streaming=data_args.streaming)
        eval_rows = load_rows(data_args, data_args.eval_split, streaming=data_args.streaming)
        if config.interpolate:
            chosen_on = selection_rows(
                data_args,
                train_rows,
                recipe.selection_split,
                recipe.max_selection_images,
                base_is_trained_here=model_args.model_name_or_path is None,
            )
            train_rows = chosen_on.rest
    set_seed(config.seed)
    classifier = load_classifier(model_args, train_rows, say)
    train_set = training_images(data_args, train_rows, classifier, config.seed)
    eval_set = evaluation_images(
        eval_rows, classifier, recipe.max_eval_images, skip_corrupt=data_args.skip_corrupt_images
    )
    selection = None
    if config.interpolate:
        selection = Selection(
            classifier.model,
            selection_images(chosen_on, classifier, skip_corrupt=data_args.skip_corrupt_images),
            conditions,
            recipe.interpolate_grid,
            chosen_on.note,
        )
    if missing := [why for condition in conditions if (why := lacks(condition, eval_set))]:
        raise UsageError(f"{missing[0]}; or leave that condition out")
    if not data_args.streaming:
        check_images(config, len(train_set))
    others = {"plain": output / "control"} if recipe.control else {}
    others |= {name: output / "beside" / name for name in recipe.beside if name not in (config.objective, *others)}
    if warning := disk_space_warning(classifier.model, config, trainings=1 + len(others)):
        say(warning)
    contents = {"training images": train_set.content_fingerprint(), "test images": eval_set.content_fingerprint()}
    if classifier.weights is not None:
        contents["base weights"] = classifier.weights
    if selection is not None:
        contents["selection images"] = selection.images.content_fingerprint()
    with state.main_process_first():
        identity = claim_folder(output, settings, contents, overwrite=recipe.overwrite, say=say)
    if model_args.model_name_or_path is None:
        train_base_model(
            classifier,
            train_set,
            output / "base",
            config,
            epochs=recipe.base_epochs,
            learning_rate=recipe.base_learning_rate,
            batch_size=recipe.base_batch_size,
            say=say,
        )

    # Measure, fine-tune, measure what was written
    size = 0 if data_args.streaming else 4 * 3 * math.prod(classifier.preprocessing.size) * len(eval_set)
    prepared: dict[Condition, Any] | None = {} if 0 < size * len(conditions) < KEPT_BYTES else None

    def measure(folder: Path | str, revision: str | None = None) -> Any:
        model = AutoModelForImageClassification.from_pretrained(
            folder, revision=revision, config=classifier.model.config
        )
        pixel_model = PixelModel(
            model.to(config.device).eval(), classifier.preprocessing.mean, classifier.preprocessing.std
        )
        batch_size = config.per_device_eval_batch_size
        return evaluate(
            pixel_model, eval_set, conditions, batch_size=batch_size, seed=config.seed,
            progress=not config.disable_tqdm, prepared=prepared,
        )  # fmt: skip

    def finetune(objective: str, folder: Path) -> NullspaceTrainer:
        say(f"Fine-tuning ({objective}): {config.rounds} rounds x {config.steps_per_round} steps of "
            f"{config.global_batch_size} images")  # fmt: skip
        args = copy.copy(config)
        args.objective, args.output_dir = objective, str(folder)
        args.push_to_hub = config.push_to_hub and folder == output  # the others stay here
        trainer = NullspaceTrainer(
            copy.deepcopy(classifier.model),
            args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=collate,
            processing_class=classifier.image_processor,
        )
        trainer.run, trainer.selection = f"{identity}-{objective}", selection
        checkpoint = last_complete_checkpoint(folder, args.world_size, trainer.run)
        if checkpoint is not None:
            say(f"Going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(_internal_call=True)  # not pushed: that comes when it has been measured
        trainer.accelerator.wait_for_everyone()
        if selection is not None:
            say(f"Interpolated ({objective}), {read_json(folder / INTERPOLATION_NAME)['chosen']}")
        return trainer

    say(f"Measuring before: {len(eval_set)} images, {len(conditions)} conditions")
    if model_args.model_name_or_path is None:
        results = {"before": measure(output / "base")}
    elif classifier.labels.new_head:
        results = {}  # a head that was not trained has no accuracy worth a column
    else:
        results = {"before": measure(model_args.model_name_or_path, model_args.model_revision)}
    for name, folder in others.items():
        finetune(name, folder)
        results[name] = measure(folder)
    trainer = finetune(config.objective, output)
    title = config.preset if config.preset == "robust" else config.objective
    results[title] = measure(output)
    if trainer.ema is not None:
        results[f"{title}, EMA"] = measure(output / "ema")

    # Report
    remarks = ""
    if state.is_main_process:
        context = {
            "images": f"{data_args.dataset_name}, split {data_args.eval_split}, first {len(eval_set)}",
            "settings": settings,
            "rounds": [{key: value for key, value in entry.items() if key != "trace"} for entry in trainer.history],
        }
        if selection is not None:
            places = others | {title: output, f"{title}, EMA": output / "ema"}
            chosen = {name: read_json(places[name] / INTERPOLATION_NAME) for name in results if name in places}
            context["alpha"] = {name: each["alpha"] for name, each in chosen.items()}
            remarks = remarks_on(chosen)
        judged = verdict(results, title)
        paths = write_report(
            results, output, context=context, remarks=remarks + (f"\n{escape(judged)}\n" if judged else "")
        )
        if trainer.history:
            paths["noise"] = plot_history(trainer.history, config.epsilon, output / "noise.png")
        say("\n" + terminal_table(results) + "\n")
        if judged:
            say(f"{judged}\n")
        say(f"Model, image processor and noises: {output}. Numbers: {paths['json']}. Picture: {paths['png']}")
        say(f"Use it: pipeline('image-classification', model={str(output)!r})")

    # Publish
    if config.push_to_hub:
        trainer.push_to_hub()
        say(f"Pushed to {trainer.hub_model_id}")


if __name__ == "__main__":
    run(main)
