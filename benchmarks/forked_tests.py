"""Tests in processes that are forked from this one, which has imported the libraries, in a copy of the tree."""

import ast
import compileall
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, RECIPES = "src/hf_nullspace", "recipes"  # the study's analysis is in recipes/
WHOLE = "whole"  # a context: what a fixture of a whole file ran, on behalf of every test of that file


def copied(folder):
    """A copy of what git knows and of what it does not ignore, compiled."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for code in ("src", RECIPES):
        compileall.compile_dir(str(folder / code), quiet=1)
    return folder


def import_libraries():
    """Everything that the package and its tests import from elsewhere, once, before the forks."""
    wanted = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted |= {(node.module, alias.name) for alias in node.names}
    own = {"hf_nullspace", "figures", "study", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, name in sorted(wanted):
            if module.partition(".")[0] not in own:
                try:
                    getattr(importlib.import_module(module), name or "__name__", None)
                except Exception:  # an optional one, or one that a test expects to fail
                    continue
    import torch

    torch.set_num_threads(1)


class Watcher:
    """A pytest plugin: the first test that failed; and with ``coverage``, on whose behalf a line runs."""

    def __init__(self, coverage=None):
        self.coverage, self.failed, self.test, self.seconds = coverage, [], "", defaultdict(float)
        self.tests = []

    def pytest_collection_finish(self, session):
        self.tests = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_logstart(self, nodeid, location):
        self.test = nodeid
        self.on_behalf_of(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope != "function":
            self.on_behalf_of(f"{WHOLE} {self.test.partition('::')[0]}")
        found = yield
        self.on_behalf_of(self.test)
        return found

    def on_behalf_of(self, context):
        if self.coverage:
            self.coverage.switch_context(context)


def child(folder, tests, answer, lines):
    """In the forked process: run ``tests`` in the copy, write what happened, and leave."""
    os.setsid()
    os.chdir(folder)
    for number, place in ((0, os.devnull), (1, "log"), (2, "log")):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = str(folder / "src")
    sys.dont_write_bytecode = lines is None
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    measured = None
    if lines is not None:
        import coverage

        sources = [str(folder / PACKAGE), str(folder / RECIPES)]
        measured = coverage.Coverage(source=sources, data_file=str(lines), config_file=False)
        measured.start()
    watcher = Watcher(measured)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *tests], plugins=[watcher])
    if measured:
        measured.stop()
        measured.save()
    found = {name: getattr(watcher, name) for name in ("failed", "seconds", "tests")}
    answer.write_text(json.dumps(found | {"code": int(code)}))
    os._exit(0)


class Run:
    """Tests that run in a process of their own, with a limit in seconds."""

    def __init__(self, folder, tests, limit, lines=None):
        self.answer = folder / "answer.json"
        self.answer.unlink(missing_ok=True)
        self.begun, self.limit = time.monotonic(), limit
        self.pid = os.fork()
        if not self.pid:
            try:
                child(folder, tests, self.answer, lines)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(70)

    def result(self):
        """None while it runs; else (outcome, test): "noticed", "survived" or "timeout"."""
        done, _ = os.waitpid(self.pid, os.WNOHANG)
        late = time.monotonic() - self.begun > self.limit
        if not done and not late:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the tests have started, too
        if not done:
            os.waitpid(self.pid, 0)
            return "timeout", None
        if not self.answer.is_file():
            return "noticed", "the interpreter ended"
        found = json.loads(self.answer.read_text())
        return ("survived", None) if found["code"] == 0 else ("noticed", (found["failed"] or ["no test ran"])[0])


def without_a_mutant(folder, tests, lines=None):
    """What happens to ``tests`` in the tree as it is."""
    run = Run(folder, tests, 3600, lines)
    while run.result() is None:
        time.sleep(0.1)
    if not run.answer.is_file():
        raise SystemExit(f"the tests do not run without a mutant:\n{(folder / 'log').read_text()[-3000:]}")
    return json.loads(run.answer.read_text())
