"""The house is read from the bottom up: a file imports only what stands before it (docs: CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "hf_nullspace"

# Every module, from the bottom to the top. A new file takes its place here.
ORDER = [
    "core.files",
    "core.text",
    "core.canvas",
    "core.settings",
    "core.seeds",
    "core.processes",
    "core.launcher",
    "core.uploads",
    "command_line",
    "models.loading",
    "models.frozen",
    "models.patch_embedding",
    "models.attention",
    "models.preprocessing",
    "models.image_files",
    "linear.patch",
    "linear.layer_norm",
    "linear.attention",
    "linear.box",
    "linear.rounding",
    "noise.influence",
    "noise.pixels",
    "noise.pictures",
    "noise.probe",
    "noise.history",
    "noise.card",
    "noise.provenance",
    "noise.artifact",
    "noise.bank",
    "noise.calibration",
    "noise.algorithm1",
    "noise.boundary",
    "noise.plots",
    "noise.closure",
    "robustness.pixel_model",
    "robustness.attacks.base",
    "robustness.attacks.gradient",
    "robustness.attacks.carlini_wagner",
    "robustness.attacks.patch_fool",
    "robustness.attacks.auto",
    "robustness.corruption_functions",
    "robustness.corruptions",
    "robustness.label_spaces",
    "robustness.image_sets",
    "robustness.sets",
    "robustness.checks",
    "robustness.scores",
    "robustness.published",
    "robustness.progress",
    "robustness.suite",
    "robustness.records",
    "robustness.plans",
    "robustness.summaries",
    "robustness.plots",
    "robustness.report",
    "hub.run_folder",
    "hub.tables",
    "hub.eval_results",
    "hub.card",
    "hub.staging",
    "training.rounds",
    "training.objectives",
    "training.noise_objectives",
    "training.adversarial_objectives",
    "training.preflight",
    "training.config",
    "training.run_settings",
    "training.augmentation",
    "training.columns",
    "training.label_maps",
    "training.sources",
    "training.data",
    "training.loading",
    "training.base_model",
    "training.checkpoints",
    "training.ema",
    "training.noise_stream",
    "training.cost",
    "training.private_methods",
    "training.publishing",
    "training.round_trainer",
    "training.trainer",
    "study.design",
    "study.images",
    "study.pieces",
    "study.estimate",
    "study.analysis",
    "study.flow",
    "study.report",
    "explain.maps",
    "explain.lrp",
    "explain.grid",
    "images",
    "explain.agreement",
    "ownership",
    "figures.table_4",
    "figures.report",
    "figures.bench",
    "figures.influence_against_norm",
    "figures.closure_pictures",
    "figures.progress",
    "figures.setting",
    "hub.planned",
    "hub.metric",
    "hub.recheck",
    "hub.release",
    "hub.checkpoint_files",
    "hub.timm_vit",
    "hub.convert",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "metrics" not in path.relative_to(PACKAGE).parts
}


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, by their names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}; write the full name"
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("hf_nullspace.") for name in names if name.startswith("hf_nullspace.")}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module):
    assert module in ORDER, f"{module} has no place in the house: add it to ORDER in {Path(__file__).name}"
    above = {name for name in imports_of(MODULES[module]) if ORDER.index(name) >= ORDER.index(module)}
    assert not above, f"{module} imports from a room above it: {sorted(above)}"


def test_packages_import_nothing_by_themselves():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not imports_of(path), f"{path} re-exports; import from the file that defines the name"


def test_files_stay_readable():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 360}
    assert not long, f"rooms above 350 lines: {long}"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, hf_nullspace; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
