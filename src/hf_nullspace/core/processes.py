"""The processes of torch's default group, and what they add up; without a group there is one process."""

from typing import Literal

import torch
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes) of the default group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def over_processes(tensor: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """``tensor`` summed, in place, over all processes; or its largest values."""
    if rank_and_world_size()[1] > 1:
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        torch.distributed.all_reduce(tensor, operations[operation])
    return tensor
