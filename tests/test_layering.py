"""A file imports only what is before it in `ORDER`, and packages form no circle (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "hf_nullspace"
RECIPES = Path(__file__).parents[1] / "recipes"

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
    "models.frozen",
    "models.loading",
    "models.frozen",
    "models.patch_embedding",
    "models.attention",
    "models.preprocessing",
    "data.image_files",
    "data.fingerprints",
    "data.augmentation",
    "data.transforms",
    "data.columns",
    "data.label_maps",
    "data.sources",
    "data.image_set",
    "data.image_stream",
    "averaging",
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
    "noise.closure",
    "robustness.pixel_model",
    "robustness.attacks.base",
    "robustness.attacks.gradient",
    "robustness.attacks.carlini_wagner",
    "robustness.attacks.patch_fool",
    "robustness.attacks.auto",
    "robustness.attacks.transfer",
    "robustness.corruption_functions",
    "robustness.corruptions",
    "robustness.label_spaces",
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
    "cards.run_folder",
    "cards.tables",
    "cards.eval_results",
    "cards.card",
    "cards.staging",
    "training.rounds",
    "training.objectives",
    "training.pyramid",
    "training.adversarial",
    "training.gradient_views",
    "training.universal",
    "training.stages",
    "training.preflight",
    "training.config",
    "training.run_settings",
    "training.loading",
    "training.selection",
    "training.checkpoints",
    "training.base_model",
    "training.ema",
    "training.noise_stream",
    "training.cost",
    "training.events",
    "training.interpolation",
    "training.record",
    "training.private_methods",
    "training.publishing",
    "training.watch",
    "training.trainer",
    "invisible.images",
    "invisible.ownership",
    "explain.maps",
    "explain.lrp",
    "explain.grid",
    "explain.agreement",
    "hub.planned",
    "hub.metric",
    "hub.recheck",
    "hub.release",
    "hub.checkpoint_files",
    "hub.timm_vit",
    "hub.convert",
]

# The laboratory beside the recipes that run it, in the same way. It imports the library, and nothing of the library it.
LABORATORY_ORDER = [
    "study.arguments",
    "study.design",
    "study.images",
    "study.tasks",
    "study.analysis",
    "study.schedule",
    "study.report",
    "figures.setting",
    "figures.signal",
    "figures.table_4",
    "figures.experiment",
    "figures.figure_2",
    "figures.figure_3",
    "figures.figure_4",
    "figures.table_5",
]


def modules_in(folder: Path, pattern: str) -> dict[str, Path]:
    """Name -> file, below a folder."""
    names = {path: path.relative_to(folder).with_suffix("").parts for path in sorted(folder.glob(pattern))}
    return {".".join(name): path for path, name in names.items() if name[-1] != "__init__" and "metrics" not in name}


MODULES = modules_in(PACKAGE, "**/*.py")
LABORATORY = modules_in(RECIPES, "*/*.py")


def imports_of(path: Path) -> set[str]:
    """The modules of the library and the laboratory that a file imports, by their names below the folder."""
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
        found |= {name.removeprefix("hf_nullspace.") for name in names}
    return {name for name in found if name in MODULES or name in LABORATORY}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module):
    assert module in ORDER, f"{module} is not in the order: add it to ORDER in {Path(__file__).name}"
    above = imports_of(MODULES[module]) - set(ORDER[: ORDER.index(module)])
    assert not above, f"{module} imports what comes after it: {sorted(above)}"


@pytest.mark.parametrize("module", LABORATORY)
def test_the_laboratory_has_an_order_too(module):
    assert module in LABORATORY_ORDER, f"{module}: add it to LABORATORY_ORDER in {Path(__file__).name}"
    above = imports_of(LABORATORY[module]) - {*ORDER, *LABORATORY_ORDER[: LABORATORY_ORDER.index(module)]}
    assert not above, f"{module} imports what stands after it: {sorted(above)}"


def test_packages_form_no_circle():
    """A node is a package, or a file beside the packages; what needs no other node is taken away until none is left."""
    below: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        package = module.partition(".")[0]
        below.setdefault(package, set()).update(name.partition(".")[0] for name in imports_of(path))
        below[package].discard(package)
    while lowest := {package for package, needed in below.items() if not needed & below.keys()}:
        below = {package: needed for package, needed in below.items() if package not in lowest}
    assert not below, f"packages that import each other, or need such: {below}"


def test_nothing_but_recipes_imports_hub():
    users = {name for name, path in MODULES.items() if any(part.startswith("hub.") for part in imports_of(path))}
    assert not {name for name in users if not name.startswith("hub.")}


def test_packages_import_nothing_by_themselves():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not imports_of(path), f"{path} re-exports; import from the file that defines the name"


def test_files_stay_readable():
    files = MODULES | LABORATORY
    long = {name: lines for name, path in files.items() if (lines := len(path.read_text().splitlines())) > 350}
    assert not long, f"files above 350 lines: {long}"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, hf_nullspace; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
