"""Seeds that are a function of a key: (seed, round), (seed, step, place). Near keys give unrelated seeds."""

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """One seed in [0, 2**63) from several numbers, each >= 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*key: int) -> torch.Generator:
    """A generator on the CPU with that seed."""
    return torch.Generator().manual_seed(derive_seed(*key))
