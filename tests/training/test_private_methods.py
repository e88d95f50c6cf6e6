"""Of the Trainer's private methods only those of one list are used, and the installed version has them as they are."""

import ast
import inspect
import pkgutil
import runpy
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from transformers import Trainer, ViTConfig

import hf_nullspace.training
from hf_nullspace.training.private_methods import PRIVATE, TESTED, check_private_methods
from hf_nullspace.training.trainer import NullspaceTrainer

PACKAGE = Path(hf_nullspace.training.__file__).parent
OURS = [kind for kind in NullspaceTrainer.__mro__ if kind.__module__.startswith("hf_nullspace.")]


ELSEWHERE = {
    "_attn_implementation_internal": ViTConfig(),
    "_name_or_path": ViTConfig(),
    "_modules": torch.nn.Module(),  # "_orig_mod" of a compiled model
    "_compiled_call_impl": torch.nn.Module(),  # whether it was compiled in place
    "_version": torch.zeros(1),  # whether a tensor has been written to
    "_DropoutNd": torch.nn.modules.dropout,
    "_BatchNorm": torch.nn.modules.batchnorm,
    "_resolve_features": datasets.IterableDataset,  # the columns of a mapped stream
}
"""What the package reads of other libraries, beside the Trainer, and an object that has it."""


def private(name):
    return name.startswith("_") and not name.endswith("__")


def of_the_trainer():
    """The private names of the Trainer: its methods, and what they set on ``self``."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(Trainer))))
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    set_ = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in methods | set_ if private(name)}


def used_in(tree):
    """The private names that a file defines, or reads of an object, also by ``getattr``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Attribute):
            yield node.name if isinstance(node, ast.FunctionDef) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_other_private_name_is_overridden_or_used():
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    for kind in OURS:
        assert kind.__module__.rpartition(".")[2] in modules, f"{kind} stands where this test does not look"
    used = {name for path in PACKAGE.glob("*.py") if path.stem != "private_methods"
            for name in used_in(ast.parse(path.read_text(encoding="utf-8")))}  # fmt: skip
    theirs = of_the_trainer()
    assert {"_save_checkpoint", "_train_batch_size", "_trial"} <= theirs
    assert used & theirs == {name for name in PRIVATE if private(name)}


def test_of_other_libraries_only_these_private_names_are_read():
    files = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.parent.rglob("*.py")]
    nodes = [node for tree in files for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [(ast.unparse(node.value), node) for node in nodes if isinstance(node, ast.Attribute)]
    own |= {node.attr for owner, node in attributes if owner == "self" and isinstance(node.ctx, ast.Store)}
    read = {node.attr for owner, node in attributes if owner not in ("self", "os") and private(node.attr)}
    others = {"_replace", "_commit_hash"}  # documented, of a named tuple; only set where a model came from the Hub
    assert read - own - set(PRIVATE) - others == set(ELSEWHERE), "find a public way, or add it with its reason"
    for name, holder in ELSEWHERE.items():
        assert hasattr(holder, name), name


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_trainer_has_it_with_these_parameters(name):
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert theirs == ["self", *PRIVATE[name]]
    overridden = [vars(kind)[name] for kind in OURS if name in vars(kind)]
    for method in overridden:
        assert list(inspect.signature(method).parameters) == theirs


def test_what_a_public_override_takes_is_what_the_trainer_takes():
    public = {
        (kind, name) for kind in OURS for name in vars(kind) if not name.startswith("_") and hasattr(Trainer, name)
    }
    assert {"train", "training_step", "compute_loss", "evaluate", "push_to_hub"} <= {name for _, name in public}
    for kind, name in public:
        ours, theirs = (inspect.signature(getattr(k, name)).parameters for k in (kind, Trainer))
        if not any(parameter.kind == parameter.VAR_POSITIONAL for parameter in ours.values()):
            assert list(ours)[: len(theirs)] == list(theirs), f"{kind.__name__}.{name}"


def test_another_version_is_named_in_one_line(monkeypatch):
    class Renamed:
        def _get_output_dir(self, trial, step): ...

    with pytest.raises(ImportError) as raised:
        check_private_methods(Renamed)
    assert f"transformers {transformers.__version__} does not fit" in str(raised.value)
    assert "_get_output_dir(self, trial, step), expected (self, trial); no _load_best_model;" in str(raised.value)
    assert str(raised.value).endswith(f"pip install transformers=={TESTED}")
    assert "\n" not in str(raised.value)

    class Wider(Trainer):  # harmless: another name, and a parameter that need not be given
        def _get_output_dir(self, run=None, step=None): ...

    check_private_methods(Wider)
    monkeypatch.delattr(Trainer, "_load_best_model")
    with pytest.raises(ImportError, match="its Trainer has no _load_best_model"):
        runpy.run_path(str(PACKAGE / "trainer.py"))


def test_the_version_that_is_advised_is_the_pinned_one():
    pins = Path(__file__).parents[2] / "constraints.txt"
    assert f"transformers=={TESTED}" in pins.read_text(encoding="utf-8").splitlines()
