"""Presets of a fine-tuning: the defaults of fields of NullspaceConfig that are not set."""

from typing import Any

_PAPER: dict[str, Any] = {
    "objective": "nullspace",
    "attack_eps": None,
    "rounds": 20,
    "steps_per_round": 40,
    "global_batch_size": 128,
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "epsilon": 0.03,
    "noise_limit": 3.0,
    "noise_learning_rate": 0.1,
    "noise_max_steps": 3000,
    "noise_weight_decay": 0.01,
    "noise_loss": "l2",
    "noise_stop_on": "minibatch",
    "noise_on_limit": "use",
    "noise_batch_size": 128,
    "noise_learner": "descent",
    "noise_pool_images": 0,
    "noises_at_once": 1,
    "noise_bank_size": 1,
    "noise_mix": "one",
    "noise_warm_start": False,
    "interpolate": False,
}

_DESCENT = _PAPER | {"noise_weight_decay": 0.0, "noise_stop_on": "held_out", "noise_on_limit": "rescale"}

_BOUNDARY = _DESCENT | {
    "noise_learner": "boundary",
    "noise_learning_rate": 0.4,
    "noise_max_steps": 60,
    "noise_pool_images": 1024,
}

_ROBUST = _BOUNDARY | {
    "objective": "fast",
    "attack_eps": "2/255",
    "rounds": 6,
    "steps_per_round": 160,
    "learning_rate": 5e-4,
    "interpolate": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "boundary": _BOUNDARY,
    "descent": _DESCENT,
    "paper": _PAPER,
    "robust": _ROBUST,
}
"""Defaults of unset fields. "paper" is Algorithm 1 with the settings of appendix A.3. "descent" differs where these do
not guarantee epsilon: no decay of the noise, epsilon is tested on held-out images, and after T steps the noise is
scaled into it. "boundary", the default, follows the edge of epsilon, for less than the fine-tuning itself costs.
"robust" is not the paper's: an adversarial view of a single step in the place of the noise, and then part of the way
back to the checkpoint (docs/robustness.md)."""
