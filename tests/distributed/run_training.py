"""Run by every process of a launch: the training runs of a JSON file, one after the other, in the same processes.

``python run_training.py CASES.json FOLDER``. For each case, FOLDER/NAME/rank-R.pt holds what rank R ended with. Several
cases share a launch because starting one costs many times what a tiny run does.
"""

import copy
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from torch import Tensor

from hf_nullspace.data.image_set import ImageSet
from hf_nullspace.models.preprocessing import make_image_processor
from hf_nullspace.noise.artifact import NullspaceNoise
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.interpolation import Selection
from hf_nullspace.training.trainer import NullspaceTrainer
from tiny_models import tiny_model
from tiny_training import CONDITIONS, Images, augmented, pictures

IMAGES = 96
SETTINGS: dict[str, Any] = {
    "preset": "descent",
    "rounds": 3,
    "steps_per_round": 2,
    "global_batch_size": 8,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "epsilon": 0.05,
    "noise_limit": 4.0,
    "noise_max_steps": 100,
    "noise_on_limit": "error",
    "noise_batch_size": 7,  # 4 images on one rank, 3 on the other
    "held_out_images": 21,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 3,
}


class FixedImages(Images, ImageSet):
    """The same images in every process; in the noise stream of one round it may end, or poison, one rank or all."""

    def __init__(self, dtype: torch.dtype, trouble: dict[str, Any] | None = None) -> None:
        super().__init__(IMAGES, dtype, seed=7)
        self.trouble, self.reads = trouble, -1

    def with_key(self, name: str, part: int) -> "FixedImages":
        stream = copy.copy(self)
        stream.reads = 0 if self.trouble is not None and part == self.trouble["round"] else -1
        return stream

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        if self.trouble is not None and self.reads >= 0 and self.trouble["rank"] in (rank(), "all"):
            self.reads += 1
            if self.reads > self.trouble["after"]:
                return row | {"pixel_values": self.strike(row["pixel_values"], self.trouble["what"])}
        return row

    def strike(self, pixel_values: Tensor, what: str) -> Tensor:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "corrupt":
            raise OSError(f"image file is truncated (on rank {rank()})")
        return pixel_values * float("nan")


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def stream_of(dtype: torch.dtype, read: list[int]) -> Any:
    """The fixed images as a streaming data set of four shards; ``read`` gets the index of each that this rank reads."""
    images = FixedImages(dtype)
    columns = {"pixel_values": images.pixel_values.tolist(), "labels": images.labels.tolist(), "index": range(IMAGES)}

    def note(row: dict[str, Any]) -> dict[str, Any]:
        read.append(row["index"])
        return row

    return Dataset.from_dict(columns).to_iterable_dataset(num_shards=4).map(note, remove_columns=["index"])


def collate_as(dtype: torch.dtype) -> Any:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixel_values = torch.stack([torch.as_tensor(row["pixel_values"], dtype=torch.float64) for row in rows])
        labels = torch.utils.data.default_collate([row["labels"] for row in rows])
        return {"pixel_values": pixel_values.to(dtype), "labels": labels}

    return collate


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train as the case says; what this rank ended with."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    model = tiny_model(case.get("family", "vit")).to(dtype)
    output = folder / case.get("output", case["name"]) / "run"
    config = NullspaceConfig(**{**SETTINGS, "output_dir": str(output), **case.get("settings", {})})
    read: list[int] = []
    dataset = stream_of(dtype, read) if case.get("streaming") else FixedImages(dtype, case.get("trouble"))
    pixels = case.get("pixels")  # images that were pixels in [0, 1], with the processor that normalised them
    if pixels == "augmented":
        dataset = augmented("augmix+mixup+cutmix", IMAGES)
    elif pixels:
        dataset.pixel_values = 2 * dataset.pixel_values.sigmoid() - 1
    trainer = NullspaceTrainer(
        model,
        config,
        train_dataset=dataset,
        eval_dataset=FixedImages(dtype) if case.get("evaluate") else None,
        data_collator=collate_as(dtype),
        processing_class=make_image_processor(16) if pixels else None,
    )
    if config.interpolate:  # 21 images: 11 on one rank, 10 on the other
        trainer.selection = Selection(copy.deepcopy(model), pictures(21), CONDITIONS, alphas=(0.5, 1.0))
    with counted_messages() as messages:
        trainer.train(resume_from_checkpoint=case.get("resume", False))
    metrics = trainer.evaluate() if case.get("evaluate") else {}
    if case.get("save"):
        trainer.save_model()
    return {
        "processes": config.world_size,
        "kind": type(next(trainer.model.parameters())).__name__ + type(next(trainer.model.parameters()).data).__name__,
        "parameters": full_parameters(trainer.model),
        "average": full_parameters(trainer.ema.model) if trainer.ema is not None else {},
        "state": trainer.record.objective.state(),
        "noise": trainer.noise and trainer.noise.tensor,
        "provenance": trainer.noise and asdict(trainer.noise.provenance),
        "read": read,
        "noises": [NullspaceNoise.load(path).tensor for path in sorted((output / "noises").glob("*.safetensors"))],
        "history": trainer.history,
        "global_step": trainer.state.global_step,
        "metrics": metrics,
        "messages": messages,
        "cost": trainer.cost.summary(),
        "chosen": json.loads((output / "interpolation.json").read_text()) if config.interpolate else None,
        "watched": [entry for entry in trainer.state.log_history if "fast/pgd_accuracy" in entry],
    }


def full_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    def full(parameter: Any) -> Tensor:
        return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()

    return {name: full(parameter) for name, parameter in model.named_parameters()}


class counted_messages:
    """Counts the all-reduces that Python code asks for (the noise's; DDP's own do not pass here), by their size."""

    def __enter__(self) -> Counter[tuple[int, int]]:
        self.original = torch.distributed.all_reduce
        counts: Counter[tuple[int, int]] = Counter()

        def all_reduce(tensor: Tensor, *args: Any, **named: Any) -> Any:
            counts[(tensor.numel(), tensor.element_size())] += 1
            return self.original(tensor, *args, **named)

        torch.distributed.all_reduce = all_reduce
        return counts

    def __exit__(self, *error: Any) -> None:
        torch.distributed.all_reduce = self.original


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard the model on a CPU as it does on GPUs.

    accelerate 1.15 takes an FSDP plugin for MULTI_GPU and its like only; with MULTI_CPU it forgets it and wraps in DDP,
    without a word (``AcceleratorState.__init__``). torch's ``fully_shard`` itself works with gloo.
    """
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def run_all(cases: list[dict[str, Any]], folder: Path) -> None:
    """Every case in turn; each leaves the environment, and what accelerate keeps of a run, as they were."""
    for case in cases:
        environment = dict(os.environ)
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        begin = time.perf_counter()
        try:
            result = run(case, folder)
        except Exception as error:
            if not case.get("fails"):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        finally:
            os.environ.clear()
            os.environ.update(environment)  # the Trainer hands precision and compiler to accelerate through it
            AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        result["seconds"] = time.perf_counter() - begin
        target = folder / case["name"] / f"rank-{rank()}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, target)


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see conftest.py
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    run_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
