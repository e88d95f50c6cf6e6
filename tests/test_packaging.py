"""What is shipped: the real wheel, built and unpacked, its metadata, and the pinned versions against the ranges."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_nullspace

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAME = PROJECT["project"]["name"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
NOT_PINNED = {"torchvision"}  # optional, and no build of it loads beside the CPU build of torch


def package_files(package: Path) -> set[str]:
    """Every file of the package that is not made by running it, relative to the folder above."""
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(package.parent).as_posix() for path in files}


def requirements() -> list[Requirement]:
    """Every requirement that pyproject.toml states, of the package, its extras and its build."""
    groups = [PROJECT["project"]["dependencies"], PROJECT["build-system"]["requires"], *EXTRAS.values()]
    return [Requirement(line) for group in groups for line in group]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt: lines of the form name==version"
    versions = {canonicalize_name(name): version for name, version in pairs}
    assert len(versions) == len(pairs), "constraints.txt pins a package twice"
    return versions


def problems_of(requirements: list[Requirement], versions: dict[str, str]) -> list[str]:
    """Requirements without a pin, and pins outside of their ranges."""
    found = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == NAME:
            found += [f"{NAME}[{extra}]: no such extra" for extra in requirement.extras if extra not in EXTRAS]
        elif name in NOT_PINNED:
            continue
        elif name not in versions:
            found.append(f"{requirement}: not pinned in constraints.txt")
        elif not requirement.specifier.contains(versions[name]):
            found.append(f"{requirement}: constraints.txt pins {versions[name]}")
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, built without network, which is what installing a pure Python wheel does."""
    folder, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(installed):
    expected = package_files(ROOT / "src" / "hf_nullspace")
    data = {name for name in expected if not name.endswith(".py")}
    assert "hf_nullspace/py.typed" in data
    assert package_files(installed / "hf_nullspace") == expected
    changed = [name for name in expected if (installed / name).read_bytes() != (ROOT / "src" / name).read_bytes()]
    assert changed == []
    others = {path.name for path in installed.iterdir()} - {"hf_nullspace"}
    assert others == {f"hf_nullspace-{hf_nullspace.__version__}.dist-info"}
    assert {"hf_nullspace/figures/__init__.py", "hf_nullspace/study/__init__.py"}.isdisjoint(expected)


def test_its_data_files_are_in_git():
    """What .gitignore hides is here on this machine and missing from every clone, and so from the next wheel."""
    command = ["git", "-C", str(ROOT), "ls-files", "--others", "--ignored", "--exclude-standard", "src/hf_nullspace"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    ignored = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name in ignored if "__pycache__" not in name] == []


def test_the_metadata_is_that_of_pyproject(installed):
    (folder,) = installed.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == NAME
    assert metadata["Version"] == hf_nullspace.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(metadata["Requires-Python"].split(",")) == sorted(PROJECT["project"]["requires-python"].split(","))
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    required = {Requirement(line) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {Requirement(line) for line in PROJECT["project"]["dependencies"]}
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_installed_package_imports_nothing_heavy(installed):
    code = """
import sys, hf_nullspace
from importlib.util import find_spec
paths = [find_spec(module).origin for module in hf_nullspace._MODULES.values()]  # imports the folders, not the files
heavy = [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules]
print(hf_nullspace.__file__, all(path.startswith(sys.argv[1]) for path in paths), heavy)
"""
    command = [sys.executable, "-c", code, str(installed)]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(installed)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed / "hf_nullspace" / "__init__.py"), "True", "[]"]


def test_every_public_name_resolves_and_is_seen_by_type_checkers():
    """The imports under TYPE_CHECKING, the table of modules and __all__ are one list, written three times."""
    assert dir(hf_nullspace) == sorted(hf_nullspace.__all__)
    for name, module in hf_nullspace._MODULES.items():
        assert getattr(hf_nullspace, name).__module__ == module, f"{name} is defined elsewhere"
    tree = ast.parse((ROOT / "src" / "hf_nullspace" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_nullspace._MODULES
    assert sorted([*seen, "__version__"]) == sorted(hf_nullspace.__all__)
    with pytest.raises(AttributeError, match="NullspaceTrainr"):
        _ = hf_nullspace.NullspaceTrainr


def test_every_direct_dependency_is_pinned_inside_its_range():
    assert problems_of(requirements(), pins()) == []
    assert {canonicalize_name(r.name) for r in requirements()} >= NOT_PINNED, "an exception that nobody needs"


def test_the_check_of_the_pins_can_fail():
    wrong = [Requirement(line) for line in ("torch>=99", "no-such-package", f"{NAME}[no-such-extra]", "numpy")]
    assert problems_of(wrong, {"torch": "2.13.0", "numpy": "2.4.6"}) == [
        "torch>=99: constraints.txt pins 2.13.0",
        "no-such-package: not pinned in constraints.txt",
        f"{NAME}[no-such-extra]: no such extra",
    ]


def test_version_citation_and_licence_are_one_in_all_places():
    version, licence = PROJECT["project"]["version"], (ROOT / "LICENSE").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert hf_nullspace.__version__ == citation["version"] == version
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", PROJECT["project"]["license"])
    assert citation["message"]
    for entry in (citation, *citation["references"]):
        assert all(entry[name] for name in ("title", "authors", "type"))
    for words in ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"):
        assert words in licence
