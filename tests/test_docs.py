"""What the documents name exists: files, functions, tests, make targets, configurations; nothing belongs to a machine.

Two strictnesses. In ``EXACT`` documents every name in backticks has to be something: a path from the repository's root
or below ``src/hf_nullspace``, a test as pytest takes it, a dotted name below ``hf_nullspace`` or ``recipes``, a name
that some file defines, a make target, a mark. In all documents and recipe headers the paths and make targets have to
exist.
"""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_nullspace"
RECIPES = ROOT / "recipes"
EXACT = ("CONTRIBUTING.md", "docs/paper_map.md", "docs/deviations.md")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
HEADINGS = ("command", "hardware", "time", "expected")

SUFFIXES = (".py", ".yaml", ".md", ".toml", ".txt", ".cff")
MADE = ("outputs/", ".venv")  # what commands make
IN_TREE = re.compile(r"(?<![\w/.-])(?:\.ci|\.github|benchmarks|docs|model_cards|recipes|src|tests)/[\w./*-]*[\w*/]")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
TARGET = re.compile(r"\bmake(?: [A-Z]+=\S+)*(?: ([a-z][\w-]*))?$")
# Assembled from parts, so that this file does not match itself.
OF_A_MACHINE = re.compile(
    "|".join(("/" + "work/", "/" + "home/", "/" + r"root\b", "/" + "Users/", "index" + "[-_]url", "trusted" + "-host",
              "find" + "-links", r"\bPIP" + "_[A-Z]"))
)  # fmt: skip


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every name that a Python file defines: functions, constants, classes, ``Class.method``, ``Class.field``."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


@cache
def modules() -> dict[str, Path]:
    """Dotted names below ``hf_nullspace`` and ``recipes``; a folder's is that of its ``__init__.py``."""
    folders = (PACKAGE, RECIPES)
    paths = {path.relative_to(folder).with_suffix(""): path for folder in folders for path in folder.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


@cache
def all_names() -> frozenset[str]:
    """Names that any file of the tree defines, arguments and values that the package takes, marks, extras, targets."""
    files = [path for folder in ("src", "tests", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    code = (path for folder in (PACKAGE, RECIPES) for path in folder.rglob("*.py"))
    package = [node for path in code for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    arguments = {node.arg for node in package if isinstance(node, ast.arg)}
    values = {node.value for node in package if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    marks = {line.partition(":")[0] for line in pyproject["tool"]["pytest"]["ini_options"]["markers"]}
    extras = set(pyproject["project"]["optional-dependencies"])
    return frozenset().union(*map(names_in, files), arguments, values, marks, extras, make_targets(), {"hf_nullspace"})


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def exists(path: str) -> bool:
    """Whether a path, in which ``*`` and ``NAME`` stand for any name, is in the repository or below the package."""
    path = re.sub(r"\bNAME\b", "*", path)
    return any(any(folder.glob(path)) if "*" in path else (folder / path).exists() for folder in (ROOT, PACKAGE))


def problem_of_path(path: str) -> str | None:
    return None if path.startswith(MADE) or exists(path) else f"{path}: no such file"


def problem_of_target(command: str) -> str | None:
    match = TARGET.search(command)
    wrong = match is not None and match[1] is not None and match[1] not in make_targets()
    return f"{command}: the Makefile has no such target" if wrong else None


def problem_of_name(span: str) -> str | None:
    """What is wrong with one span of code in an exact document; None if it is something that exists."""
    path, _, test = span.partition("::")
    if test:
        if not (ROOT / path).is_file():
            return f"{span}: no such file"
        return None if test in names_in(ROOT / path) else f"{span}: no such test in the file"
    if re.fullmatch(r"[\w./*-]+", span) and ("/" in span or span.endswith(SUFFIXES)):
        return problem_of_path(span)
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span):
        parts = span.split(".")
        for count in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:count])
            if module in modules():
                rest = ".".join(parts[count:])
                known = rest in names_in(modules()[module]) or span in modules()
                return None if known else f"{span}: {module} does not define it"
        return None if span in all_names() or span in modules() else f"{span}: no file defines it"
    return problem_of_target(span)


def code_spans(text: str) -> list[str]:
    """What stands in backticks, outside of fenced blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def code_lines(text: str) -> list[str]:
    """Lines of fenced and indented blocks."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.+)$", text, flags=re.MULTILINE)
    return [line.split("#")[0].strip() for block in fenced for line in block.splitlines()] + indented


def exact_problems(text: str) -> list[str]:
    """Every backticked name that is nothing."""
    return [problem for span in code_spans(text) if (problem := problem_of_name(span))]


def path_problems(text: str, folder: Path = ROOT) -> list[str]:
    """Paths into the tree, relative links and make targets that are not there."""
    found = [problem_of_path(path) for path in IN_TREE.findall(text)]
    links = [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    found += [f"{link}: a link to no file" for link in links if not (folder / link).exists()]
    found += [problem_of_target(code) for code in [*code_lines(text), *code_spans(text)]]
    return [problem for problem in found if problem]


def header_problems(text: str) -> list[str]:
    """What the comment at the top of a recipe's configuration lacks: its claim has four parts."""
    lines = text.splitlines()
    header = "\n".join(lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))])
    return [f"no line '{word}' in the header" for word in HEADINGS if not re.search(rf"^#\s+{word}\s+\S", header, re.M)]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXACT)
def test_every_name_in_backticks_is_something(name):
    assert exact_problems(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_links_and_make_targets_exist(name):
    assert path_problems(read(name), (ROOT / name).parent) == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("recipes/configs/")])
def test_a_configuration_is_headed_by_its_claim(name):
    assert header_problems(read(name)) == []
    assert isinstance(yaml.safe_load(read(name)), dict)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_configuration_names_exists(name):
    assert path_problems(read(name)) == []


def test_nothing_belongs_to_a_machine():
    """No absolute path of somebody's machine and no setting of a package registry in any tracked file."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    wrong = []
    for name in filter(None, tracked):
        path = ROOT / name
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
        wrong += [f"{name}: {match[0]}" for match in OF_A_MACHINE.finditer(text) if "\0" not in text]
    assert wrong == []


def test_the_checker_finds_what_is_wrong_and_lets_pass_what_is_right():
    bad = [
        *("noise/learnin.py", "noise.algorithm1.learn_noises", "NoiseSettings.epsilonn", "make tset", "learn_noize"),
        *("tests/core/test_files.py::test_nothing", "tests/test_nothing.py::test_x", "recipes/configs/no_such_*.yaml"),
    ]
    good = [
        *("noise/algorithm1.py", "src/hf_nullspace/core/files.py", "noise.algorithm1.descend", "noise", "learn_noise"),
        *("NoiseSettings.epsilon", "tests/core/test_files.py::test_a_full_disk_names_the_file", "outputs/digits"),
        *("recipes/configs/NAME.yaml", "slow", "make test", "make PYTHON=python3.11", "CE(z, y)"),
    ]
    problems = exact_problems(" and ".join(f"`{span}`" for span in (*bad, *good)))
    assert len(problems) == len(bad)
    assert all(problem.startswith(span) for problem, span in zip(problems, bad, strict=True))
    text = "See [this](docs/nothing.md).\n\n```\npython recipes/nothing.py  # make nothing\nmake nothing\n```\n"
    assert path_problems(text) == [
        "docs/nothing.md: no such file",
        "recipes/nothing.py: no such file",
        "docs/nothing.md: a link to no file",
        "make nothing: the Makefile has no such target",
    ]
    header = "# Digits.\n#   command    make demo\n#   time\nepsilon: 0.1\n#   expected   much\n"
    assert header_problems(header) == [f"no line '{word}' in the header" for word in ("hardware", "time", "expected")]
    assert OF_A_MACHINE.search("cd /" + "home/me/x")
    assert not OF_A_MACHINE.search("see https://example.org/networks and the homework/ folder")


def test_the_pictures_of_the_architecture_are_what_the_code_does():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "architecture.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
