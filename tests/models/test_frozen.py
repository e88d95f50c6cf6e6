import pytest
import torch
from torch import nn

from hf_nullspace.models.frozen import frozen


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_modes_and_flags_are_as_before_afterwards(error):
    """Also where they were mixed: a part in eval mode, a part that is not trained."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    try:
        with frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert torch.is_grad_enabled()
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
