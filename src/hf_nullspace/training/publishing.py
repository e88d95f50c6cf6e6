"""A run on the Hub: what is pushed of it, when, and what happens when a push fails.

Pushed are the model, its image processor, the noises, the histories, the results and the card (``PUBLISHED``), not
whatever lies in the folder. Left here are checkpoints (unless the strategy asks for them), the base model and the
control, and ``training_args.bin``: a pickle that nothing reads. What is pushed is without the paths of this machine.
The token is in no file.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_nullspace.cards.card import CARD_NAME, EVAL_RESULTS, INTERPOLATION_PLOT, NOISE_PLOT, PLOTS, write_card
from hf_nullspace.cards.run_folder import COST_NAME, INTERPOLATION_NAME
from hf_nullspace.cards.staging import linked_copy, published_copy
from hf_nullspace.core.files import MANIFEST_NAME
from hf_nullspace.core.uploads import files_to_push, left_behind, open_repository, push_folder, whole_name
from hf_nullspace.noise.artifact import CONFIG_NAME, WEIGHTS_NAME
from hf_nullspace.training.checkpoints import HISTORY_NAME, NOISES
from hf_nullspace.training.ema import FOLDER as EMA
from hf_nullspace.training.record import STATE_NAME
from hf_nullspace.training.run_settings import SETTINGS_NAME

logger = logging.getLogger(__name__)

_MODEL = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
          "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json",
          "processor_config.json")  # fmt: skip
_REPORT = ("results.json", "results.md", "results.csv", "results.png", *PLOTS)
_CHOICE = (INTERPOLATION_NAME, INTERPOLATION_PLOT)
PUBLISHED = (
    *_MODEL, *(f"{EMA}/{name}" for name in _MODEL), WEIGHTS_NAME, CONFIG_NAME, f"{NOISES}/round-*.safetensors",
    HISTORY_NAME, COST_NAME, SETTINGS_NAME, *_REPORT, *(f"robustness/{name}" for name in _REPORT), NOISE_PLOT,
    *_CHOICE, *(f"{EMA}/{name}" for name in _CHOICE), CARD_NAME, f"{EVAL_RESULTS}/*.yaml",
    "all_results.json", "train_results.json", "eval_results.json", "trainer_state.json",  # the Trainer's, if asked
)  # fmt: skip
"""What a run writes and a push takes; nothing else of its folder is pushed."""
_FOR_RESUMING = (
    "optimizer.pt", "optimizer.bin", "optimizer_*/*", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_*.pth",
    "trainer_state.json", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_*/*", "global_step*/*", "latest",
    "zero_to_fp32.py", STATE_NAME,
)  # fmt: skip
_PICKLES = ("training_args.bin", "*/training_args.bin")
_STAYS = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"*/{PREFIX_CHECKPOINT_DIR}-*", "base/*", "base.part/*", "control/*",
          "run-*/*", "runs/*", "records/*", "*/records/*", "per_sample/*", "*/per_sample/*", "*.lock", "*.lock.json",
          MANIFEST_NAME, STATE_NAME, *_PICKLES)  # fmt: skip
"""What a run writes for itself: it stays here without a word."""
_NAMED = 5
REPLACED = ("noises/round-*.safetensors", "model*-of-*.safetensors", "model.safetensors.index.json")
"""What an earlier push may have left and a model of now may not have."""
_STAGED = "_push-"
_BACKGROUND = HfApi()  # its one thread: pushes come in the order of their checkpoints


def push_run(
    run: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload run",
    token: str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Write the card of a finished run into its folder, and upload what is to be published as one commit.

    Raises:
        UploadError: if the Hub does not take it, with what to do; the folder is whole then.
        FileNotFoundError: if the folder is empty.
    """
    repo_id = whole_name(repo_id, token)
    if not files_to_push(Path(run), only=PUBLISHED):
        raise FileNotFoundError(f"nothing to push: {run} holds no file of a run")
    write_card(Path(run), repo_id, license=license)
    named = {"private": private, "revision": revision, "commit_message": commit_message, "token": token}
    return _push_run(Path(run), repo_id, blocking=True, **named)


def _push_run(run: Path, repo_id: str, *, blocking: bool, **named: Any) -> Any:
    """Not ``blocking``: a copy of what is published is uploaded, since the run may go on; gives a future."""
    call = f"from hf_nullspace.training.publishing import push_run; push_run({str(run)!r}, {repo_id!r})"
    named["afterwards"] = f'The run in {run} is whole; repeat the upload with: python -c "{call}"'
    push = _push_staged if blocking else partial(_BACKGROUND.run_as_future, _push_staged)
    return push(_staged_run(run, linked=blocking), repo_id, replace=REPLACED, **named)


def open_run(trainer: Any, token: str | None = None, private: bool | None = None) -> None:
    """Find or create the run's repository, so that what makes every push fail is known before hours of training.

    Raises:
        UploadError: in one line, with what to do.
    """
    if not trainer.is_world_process_zero():
        return
    args, output = trainer.args, _folder_of(trainer)
    for left in output.glob(f"{_STAGED}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    trainer.hub_model_id = open_repository(
        args.hub_model_id or output.absolute().name,
        private=private if private is not None else args.hub_private_repo,
        token=token or args.hub_token,
        afterwards=f"{output} is as it was; without push_to_hub everything stays here",
    )
    trainer.push_in_progress = None


def write_run_card(trainer: Any, license: str | None = None) -> None:
    """Write README.md from what the run left in its folder."""
    if trainer.is_world_process_zero():
        write_card(_folder_of(trainer), trainer.hub_model_id, license=license)


def push_after_training(
    trainer: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    **ignored: Any,
) -> Any:
    """Save the model, write the card, and upload the run's folder as one commit, by the main process.

    Not ``blocking``: a copy of the folder is uploaded, and a future is returned.

    Raises:
        UploadError: if the Hub does not take it, with what to do. The run is whole in ``output_dir`` then.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    token = token or trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(license=license)
    if trainer.push_in_progress is not None:
        trainer.push_in_progress.wait_until_done()
    message, revision = commit_message or "End of training", revision or trainer.args.hub_revision
    named = {"revision": revision, "commit_message": message, "token": token}
    return _push_run(_folder_of(trainer), str(trainer.hub_model_id), blocking=blocking, **named)


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Upload the checkpoint's model as it is now, in the background; training continues, even if that fails."""
    args, state, run = trainer.args, trainer.state, _folder_of(trainer)
    running = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if args.hub_strategy == HubStrategy.END or (running and not args.hub_always_push):
        return
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    place = None
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
    now = f"step {state.global_step}"
    if args.save_strategy != SaveStrategy.STEPS:
        now = f"epoch {int(state.epoch or 0)}"
    try:
        staged = _staged_checkpoint(checkpoint, run, place, str(trainer.hub_model_id))
    except (OSError, ValueError) as error:
        logger.warning("%s was not pushed, it could not be gathered: %s. Training goes on", checkpoint.name, error)
        return
    job: Any = _BACKGROUND.run_as_future(
        _push_staged,
        staged,
        str(trainer.hub_model_id),
        ignore_errors=True,
        revision=args.hub_revision,
        commit_message=f"Training in progress, {now}",
        token=args.hub_token,
        replace=[*REPLACED, *([f"{place}/*"] if place else [])],
        afterwards=f"Training goes on, {checkpoint} is whole, and the next push brings all of it",
    )
    if running:
        trainer.push_in_progress.jobs.append(job)
    else:
        trainer.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # annotated as one future, used as a list


def _folder_of(trainer: Any) -> Path:
    return Path(str(trainer.args.output_dir))


def published_files(folder: Path, *more: str) -> list[str]:
    """The files of a run, or of a checkpoint with ``more`` patterns, that are pushed; a warning names what is not."""
    only = (*PUBLISHED, *more)
    if unexpected := left_behind(folder, _STAYS, only):
        names = ", ".join(name if name.isprintable() else repr(name) for name in unexpected[:_NAMED])
        names += f" and {len(unexpected) - _NAMED} more" if len(unexpected) > _NAMED else ""
        logger.warning("left in %s: %s; no run writes that, or it is a link out of the folder", folder, names)
    return files_to_push(folder, only=only)


def _staged_run(run: Path, *, linked: bool) -> Path:
    """A folder beside the run's files with what is published of them."""
    with _new_folder(run) as staged:
        for name in published_files(run):
            published_copy(run / name, staged / name, linked=linked)
    return staged


def _staged_checkpoint(checkpoint: Path, run: Path, place: str | None, repo_id: str) -> Path:
    """The checkpoint's model with its noises and a card; at ``place`` the checkpoint itself, as it is, for resuming.

    Its files are written once, so they are linked: it may be deleted before they are uploaded.
    """
    with _new_folder(run) as staged:
        found = published_files(checkpoint, *_FOR_RESUMING)
        for name in files_to_push(checkpoint, _FOR_RESUMING, PUBLISHED):
            published_copy(checkpoint / name, staged / name, linked=True)
        for folder, name in ((checkpoint.parent, f"{NOISES}/round-*.safetensors"), (run, SETTINGS_NAME)):
            for file in files_to_push(folder, only=(name,)):
                published_copy(folder / file, staged / file)
        for name in found if place else ():
            linked_copy(checkpoint / name, staged / str(place) / name)
        write_card(staged, repo_id)
    return staged


@contextmanager
def _new_folder(run: Path) -> Iterator[Path]:
    """A temporary folder inside the run's, for links; deleted on failure."""
    staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=run))
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _push_staged(staged: Path, repo_id: str, *, ignore_errors: bool = False, **named: Any) -> Any:
    try:
        return push_folder(staged, repo_id, **named)
    except Exception as error:
        if not ignore_errors:
            raise
        logger.warning("%s", error)
        return None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
