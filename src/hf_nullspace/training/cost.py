"""What a run costs, in units that do not depend on the machine: passes of one image through the model.

Counted where the model is called and where a gradient comes back to its logits, by stage: the training steps, the
attacks inside of them, the making of the noises, what is watched beside them, the choice of alpha on selection images.
A pass of one image counts once; a backward pass counts as "to the input" while the parameters are frozen (noises,
attacks) and as "to the parameters" else.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_nullspace.core.processes import rank_and_world_size

NAME = "cost.json"
STAGES = ("training", "attack", "noise", "watch", "selection")
KINDS = ("forward", "backward_to_input", "backward_to_parameters")
WEIGHTS = {"forward": 1, "backward_to_input": 1, "backward_to_parameters": 2}
"""Multiplications of each pass in units of a forward pass: each linear map runs once forward, once to hand the gradient
down, and once for its weights (counted operations of ViT-B/16: 1.03 and 2.0, docs/scaling.md)."""


class Counted(nn.Module):
    """A model that reports every call to a :class:`Cost`; its one child is the model, so wrappers are seen through."""

    def __init__(self, model: nn.Module, cost: "Cost") -> None:
        super().__init__()
        self.module = model
        self._cost = cost

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Asked before: FSDP2 shows other parameters while it has them whole.
        trains = any(parameter.requires_grad for parameter in self.module.parameters())
        outputs = self.module(*args, **kwargs)
        self._cost.count(outputs.logits, trains)
        return outputs


class Cost:
    """The passes and seconds of one run; those of all processes together after :meth:`sync`."""

    def __init__(self) -> None:
        self._before: defaultdict[str, float] = defaultdict(float)  # of all processes, up to the last sync
        self._mine: defaultdict[str, float] = defaultdict(float)  # of this process, since then
        self._stage = "training"
        self._began = time.perf_counter()

    def start(self, saved: dict[str, Any] | None = None) -> None:
        """A run begins: from nothing, or from what a checkpoint has (:meth:`summary`)."""
        self._before, self._mine = defaultdict(float), defaultdict(float)
        for stage, entry in ((saved or {}).get("stages") or {}).items():
            self._before |= {f"{stage}/{name}": value for name, value in entry.items()}
        self._before["seconds"] = (saved or {}).get("seconds", 0.0)
        self._began = time.perf_counter()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """What is counted inside belongs to ``stage``."""
        before, self._stage = self._stage, stage
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._stage = before
            self._mine[f"{stage}/seconds"] += time.perf_counter() - begin

    def counted(self, model: nn.Module) -> Counted:
        """``model``, with its calls counted."""
        return Counted(model, self)

    def count(self, logits: Tensor, trains: bool) -> None:
        """One forward pass that gave ``logits`` (b, K), and, if one comes, the backward pass from them.

        ``trains``: whether that goes to parameters, and not to the input alone.
        """
        images, stage = len(logits), self._stage
        self._mine[f"{stage}/forward"] += images
        if logits.requires_grad:
            kind = "backward_to_parameters" if trains else "backward_to_input"

            def came_back(gradient: Tensor) -> None:
                self._mine[f"{stage}/{kind}"] += images

            logits.register_hook(came_back)

    def sync(self) -> None:
        """Add up what the processes counted; every process has to call it."""
        now = time.perf_counter()
        self._before["seconds"] += now - self._began
        self._began = now
        mine = [dict(self._mine)] * rank_and_world_size()[1]
        if len(mine) > 1:
            torch.distributed.all_gather_object(mine, dict(self._mine))
        for key in sorted({key for counts in mine for key in counts}):
            values = [counts.get(key, 0) for counts in mine]
            self._before[key] += max(values, key=abs) if key.endswith("/seconds") else sum(values)
        self._mine = defaultdict(float)

    def passes(self, stage: str | None = None) -> dict[str, int]:
        """Passes of one stage, or of all, up to the last :meth:`sync`."""
        stages = STAGES if stage is None else (stage,)
        return {kind: int(sum(self._before[f"{name}/{kind}"] for name in stages)) for kind in KINDS}

    def summary(self) -> dict[str, Any]:
        """Ready for JSON: passes, forward-equivalents (:data:`WEIGHTS`) and seconds of the run, and those by stage.

        The seconds of a stage are those of the slowest process; they are the host's, which a GPU may be behind.
        """
        stages: dict[str, dict[str, Any]] = {}
        seconds = {stage: self._before[f"{stage}/seconds"] for stage in STAGES[1:]}
        for stage in STAGES:
            stages[stage] = {**self.passes(stage), "forward_equivalents": equivalents(self.passes(stage))}
            if stage in seconds:
                stages[stage]["seconds"] = round(seconds[stage], 3)
        total = self.passes()
        return {
            **total,
            "forward_equivalents": equivalents(total),
            "seconds": round(self._before["seconds"], 3),
            "stages": stages,
        }


def equivalents(passes: dict[str, int]) -> int:
    """Passes of one image as a number of forward passes of one image (:data:`WEIGHTS`)."""
    return sum(WEIGHTS[kind] * passes[kind] for kind in KINDS)
