"""What those get who set nothing: defaults that numbers on our pages and in papers were made with, a second time.

``docs/deviations.md`` says which of them are not the paper's. A default is changed here and there together, and in
CHANGELOG.md: numbers that were measured before mean something else.
"""

import dataclasses
import inspect

import pytest

from hf_nullspace.hub import recheck
from hf_nullspace.linear import attention, box, layer_norm, patch
from hf_nullspace.noise import (
    algorithm1,
    artifact,
    bank,
    boundary,
    calibration,
    closure,
    history,
    influence,
    provenance,
)
from hf_nullspace.robustness import checks, scores, suite
from hf_nullspace.robustness.attacks import auto, base, carlini_wagner, gradient, patch_fool
from hf_nullspace.training import adversarial, objectives, pyramid, rounds, stages
from study import analysis

TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # A.5
SIGNATURES = [  # what may be given without its name ("": anything), and defaults; the rest is given by its name
    # Algorithm 1 and A.3; weight decay and the stopping test are ours
    (algorithm1.NoiseSettings, "", {"epsilon": 0.03, "noise_limit": 3.0, "learning_rate": 0.1, "max_steps": 3000,
                                    "weight_decay": 0.0, "loss": "l2", "stop_on": "held_out", "on_limit": "use",
                                    "norm_weight": 0.0, "norm": "centred"}),
    (boundary.BoundarySettings, "", {"epsilon": 0.03, "steps": 60, "learning_rate": 0.2, "noise_limit": 3.0,
                                     "pool_images": 1024, "count": 1, "loss": "l2", "tolerance": 0.04}),
    (calibration.scale_to_influence, "influence_at epsilon",
     {"start": 1.0, "tolerance": 0.02, "largest": float("inf")}),
    (calibration.scale_into, "influence_at epsilon", {"start": 1.0, "tolerance": 1 - 0.96, "largest": float("inf")}),
    (calibration.calibrate, "model directions epsilon held_out", {"tolerance": 0.02, "largest": float("inf")}),
    (influence.permuted, "noise generator", {"raw": False}),
    (history.NoiseHistory.summary, "", {"points": 200}),
    (closure.scaling, "model batches noises factors", {"factors": TENTHS}),
    (closure.combinations, "model batches pairs alphas_1 alphas_2", {"alphas_1": TENTHS, "alphas_2": TENTHS}),
    (rounds.Round, "", {"warm_start": False, "bank_size": 1, "previous": (), "chunk_size": None}),
    (stages.forward_views, "model hook inputs views input_name", {"together": True}),
    (objectives.view_loss, "", {"label_smoothing": 0.0}),
    # The attacks' papers; the paper's columns for FGSM and MIM
    (gradient.FGSM, "", {"eps": 1 / 255}),
    (gradient.PGD, "", {"eps": 8 / 255, "step": None, "steps": 10, "norm": "linf", "random_start": True}),
    (adversarial.RandomStartFGSM, "", {"eps": 8 / 255, "step": None, "steps": 1, "norm": "linf", "random_start": True}),
    (adversarial.DivergencePGD, "", {"eps": 8 / 255, "step": None, "steps": 10, "start": 0.001}),
    (pyramid.PyramidPGD, "", {"eps": 6 / 255, "step": None, "steps": 5, "scales": (32, 16, 1),
                              "multipliers": (20.0, 10.0, 1.0)}),
    (gradient.MIM, "", {"eps": 1 / 255, "step": None, "steps": 10, "decay": 1.0}),
    (carlini_wagner.CW, "", {"c": 1.0, "kappa": 0.0, "steps": 50, "lr": 0.01, "binary_search_steps": 1,
                             "abort_early": False}),
    (patch_fool.PatchFool, "", {"choice": "attention", "num_patch": 1, "steps": 250, "lr": 0.22,
                                "attention_weight": 0.002, "attention_layer": None, "mild": None, "eps": None,
                                "sparse": 0, "sparse_freeze": 200, "original_projection": False, "early_stop": False}),
    (patch_fool.without_conflict, "pull gradient", {"original": False}),
    (auto.AutoAttack, "", {"eps": 8 / 255, "norm": "linf", "targets": 9, "queries": 5000, "iterations": 100}),
    # Measuring: 95% intervals, 15 bins (Guo et al. 2017)
    (scores.accuracy, "correct", {}),
    (scores.wilson, "correct n", {"confidence": 0.95}),
    (scores.paired_difference, "before after", {"resamples": 10_000}),
    (scores.paired_mean_difference, "", {"resamples": 2_000, "seed": 0}),
    (scores.expected_calibration_error, "confidence correct", {"bins": 15}),
    (analysis.differences, "results groups pairs", {"resamples": 2000}),
    (checks.run_checks, "model pixels labels", {"eps": 8 / 255, "seed": 0}),
    (suite.evaluate, "model images conditions", {"seed": 0, "workers": 0, "per_sample": False, "progress": True}),
    (recheck.recheck, "", {"count": 200}),
    # Exact nullspaces
    (attention.LayerConditions.hold, "", {"tolerance": 1e-6}),
    (box.nearest_in_box, "row_basis source target", {"iterations": 2000, "tolerance": 1e-5}),
    (box.nearest_invisible_image, "nullspace source target", {"iterations": 2000, "tolerance": 1e-5}),
    (layer_norm.LayerNormNullspace.sample, "", {"norm": 1.0}),
    (layer_norm.exact_encoder_nullspace, "model pixel_values", {"norm": 1000.0, "seed": 0}),
    (layer_norm.check_direction, "model pixel_values", {"norm": 1000.0, "seed": 0}),
    (patch.PatchNullspace.sample, "self generator count", {"count": 1, "std": 1.0}),
    # Without a number
    (algorithm1.learn_noise, "model batches settings", {}),
    (boundary.follow_boundary, "model batches settings", {}),
    (artifact.NullspaceNoise.save_pretrained, "self folder", {}),
    (artifact.NullspaceNoise.push_to_hub, "self repo_id", {}),
    (provenance.provenance_of, "model", {}),
    (bank.NoiseBank.save_pretrained, "self folder", {}),
    (bank.NoiseBank.push_to_hub, "self repo_id", {}),
    (rounds.Round.learn, "self", {}),
    (checks.unreliable, "checks", {}),
    (scores.mean_corruption_error, "errors reference", {}),
    (patch.PatchNullspace.from_model, "model", {}),
    (patch.PatchNullspace.from_weight, "weight", {}),
    (base.Attack.__call__, "self model pixels labels", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "names", "defaults"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_defaults_and_what_has_to_be_named(function, names, defaults):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    numbers = (int, float)
    other = [p.name for p in parameters.values() if isinstance(p.default, numbers) and p.name not in defaults]
    assert other == [] or not defaults, "a number that is not in the table"
    if names:
        kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        assert {each.kind for each in parameters.values()} <= kinds
        given = [each.name for each in parameters.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert given == names.split()


@pytest.mark.parametrize(
    "settings", [f for f, *_ in SIGNATURES if dataclasses.is_dataclass(f) and f is not rounds.Round]
)
def test_settings_are_values(settings):
    made = settings()
    assert settings() == made
    assert len({settings(), made}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.eps = 1
