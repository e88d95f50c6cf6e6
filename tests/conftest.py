"""For all tests: one thread each. That is faster for tiny models, and two test processes do not wait for each other."""

import torch

torch.set_num_threads(1)
