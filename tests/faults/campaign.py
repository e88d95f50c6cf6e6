"""A campaign of faults: each strikes a recipe or what it wrote, then the recipe is started again.

There are two good ends. "equal": exit code 0, and all that the run is for is bit for bit that of the run that nothing
disturbed. "said": exit code 2 and one line that begins with ``error:``, names the place and says what to do; doing that
gives the equal end. All else has failed: "silent" (exit code 0 and another result), "lost" (anything else), "stuck".
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from recipe_process import prepare, start
from safetensors.torch import load_file

OTHERS = ("learn_noise", "evaluate_robustness", "compare")
ONE_NOISE = "learn_noise --count 1"
HERE = Path(__file__).parent
LOG = HERE.parents[1] / "outputs" / "faults.jsonl"
"""One line per fault, as they end; ``table.py`` makes benchmarks/results/faults.json of it."""
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
).stdout.strip()
HANGS = 240  # seconds after which a process is called stuck: a start takes two on a machine that is not busy
OTHER_WORDS = ("another --output_dir", "a new --output_dir", "choose another folder", "Choose another folder")


@dataclass
class Ended:
    """How a process ended."""

    code: int | None  # None: stuck
    out: str
    err: str
    seconds: float
    orphans: list[str]

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Recipe:
    """A recipe with the arguments that it is started with, and what equal ends means for it.

    ``parts`` are patterns of files of tensors, ``plain`` of JSON files; ``label`` is the name in the table.
    """

    name: str
    words: list[str]
    parts: tuple[str, ...]
    plain: tuple[str, ...]
    undisturbed: Path | None = None
    points: dict = field(default_factory=dict)
    seconds: float = 0.0
    label: str = ""

    def __post_init__(self):
        self.label = self.label or self.name


def left_of(session, wait=20):
    """Processes of a session that still run after ``wait`` seconds; workers take some to see that they are alone."""
    until = time.monotonic() + wait
    while True:
        left = []
        for process in psutil.process_iter(["pid", "status", "cmdline"]):
            try:
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                    left.append(" ".join(process.info["cmdline"] or [])[:80])
            except (OSError, psutil.Error):
                continue
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)


def failed_last_time():
    """(kind, recipe, name) of what did not end well in :data:`LOG`."""
    last = {}
    for line in LOG.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        last[entry["kind"], entry["recipe"], entry["name"]] = entry["outcome"]
    return {key for key, outcome in last.items() if outcome not in ("equal", "said")}


OF_THE_PLACE = {"output_dir", "_name_or_path", "commit", "overwrite", "dataloader_num_workers"}
OF_THE_CLOCK = {"seconds", "sha256", "sha256_of_the_rest"}


def timeless(value):
    """Without what the clock and the place decide."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in OF_THE_PLACE | OF_THE_CLOCK}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def ignored(path, recipe):
    """Checkpoints, which a finished run needs no more, and what only helped on the way: the images of a study."""
    if any(part.startswith("checkpoint-") for part in path.parts):
        return True
    return recipe.name == "compare" and (path.parts[0] == "images" or path.name == "training_args.bin")


def files_of(folder, recipe):
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in relative if path.name != ".lock" and not ignored(path, recipe)}


def tensors_in(path):
    return {name: (str(t.dtype), t.shape, t.numpy().tobytes()) for name, t in load_file(path).items()}


def json_in(path):
    return timeless(json.loads(path.read_text()))


def differences(folder, recipe, undisturbed=None):
    """What of ``folder`` is not as in the undisturbed run: files that are there, tensors, and JSON without seconds."""
    ours, there = Path(folder), Path(undisturbed or recipe.undisturbed)
    too_many, missing = (sorted(files_of(a, recipe) - files_of(b, recipe)) for a, b in ((ours, there), (there, ours)))
    found = [f"files: {too_many} too many, {missing} missing"] if too_many or missing else []
    for patterns, content in ((recipe.parts, tensors_in), (recipe.plain, json_in)):
        for path in (path for pattern in patterns for path in sorted(there.glob(pattern))):
            name = path.relative_to(there)
            if "checkpoint-" not in str(name) and (ours / name).exists() and content(path) != content(ours / name):
                found.append(f"{name} differs")
    return found


class Campaign:
    """Starts recipes in forks of this process, judges how faults end, and keeps a line of each."""

    def __init__(self, folder):
        prepare()
        self.folder, self.number = folder, 0
        self.only = failed_last_time() if os.environ.get("FAULTS_AGAIN") else None

    def begin(self, recipe, folder, more=(), **fault):
        """Start a recipe in ``folder``; a handle for :meth:`end`."""
        self.number += 1
        log = self.folder / f"log-{self.number}"
        words = [*recipe.words, "--output_dir", str(folder), *map(str, more)]
        given = {"recipe": recipe.name, "words": words, "log": str(log), "folder": str(folder)} | fault
        process = multiprocessing.get_context("fork").Process(target=start, kwargs=given)
        process.start()
        return process, log, time.perf_counter()

    def end(self, handle):
        """Wait until a process has ended, and for the processes that it has started."""
        process, log, began = handle
        process.join(HANGS)
        seconds, code = time.perf_counter() - began, process.exitcode
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        orphans = left_of(process.pid)
        out, err = (Path(path).read_text(errors="replace") for path in (log, f"{log}.err"))
        for path in (log, Path(f"{log}.err")):
            path.unlink()
        return Ended(code, out, err, seconds, orphans)

    def run(self, recipe, folder, more=(), **fault):
        return self.end(self.begin(recipe, folder, more, **fault))

    def wanted(self, kind, name, recipe):
        """With ``FAULTS_AGAIN=1`` only what did not end well the last time is tried."""
        return self.only is None or (kind, recipe.label, name) in self.only

    def problems(self, kind, recipe, cases, strike):
        """What is wrong after ``strike(name, case)`` for each (name, case) that is wanted."""
        found = [strike(name, case) for name, case in cases if self.wanted(kind, name, recipe)]
        return [problem for problem in found if problem]

    def new_folder(self, copy_of=None):
        self.number += 1
        folder = self.folder / f"run-{self.number}"
        if copy_of is not None:
            shutil.copytree(copy_of, folder, symlinks=True)
        return folder

    def struck(self, kind, name, recipe, folder, ended, signal_name):
        """Judge a process that a signal ended, then start again. A kill leaves no word; Ctrl-C and SIGTERM one line."""
        problem = None
        if ended.code is None:
            problem = "stuck: the process hangs"
        elif ended.orphans:
            problem = f"lost: processes still run: {ended.orphans}"
        elif signal_name == "SIGKILL":
            if ended.code != -signal.SIGKILL:
                problem = f"lost: exit code {ended.code} instead of a kill: {ended.err[-300:]}"
        else:
            number = getattr(signal, signal_name)
            lines = [line for line in ended.err.splitlines() if line.startswith("stopped by ")]
            if ended.code != 128 + number or len(lines) != 1 or "Traceback" in ended.err:
                problem = f"lost: exit code {ended.code}, {len(lines)} lines: {ended.err[-500:]}"
        return self.again(kind, name, recipe, folder, problem=problem, seconds=ended.seconds)

    def again(
        self, kind, name, recipe, folder, *, mend=None, more=(), fault=None, problem=None, said="", seconds=0.0,
        undisturbed=None, named=None, keep_folder=False,
    ):  # fmt: skip
        """Start the recipe (again) in ``folder``; judge the end; keep a line of it. Returns what is wrong, or None.

        Args:
            mend: does what the error line says where that is not another option: makes room, brings a file back.
            more: further options.
            fault: the arguments of ``recipe_process.start`` that arm one.
            problem: what was wrong before, if anything was; ``seconds``, what was spent.
            said: the error line of the start before.
            undisturbed: the folder to compare with, if it is not the recipe's.
            named: what the error line has to name, if it is not the folder.
        """
        outcome = problem
        if outcome is None:
            ended = self.run(recipe, folder, more, **(fault or {}))
            seconds += ended.seconds
            outcome = self._judged(ended, recipe, folder, undisturbed)
            if outcome == "equal" and said:
                outcome = "said"
            elif outcome == "said":
                said = ended.errors[0]
                outcome, more_seconds = self._follow(said, recipe, folder, mend, more, undisturbed, named)
                seconds += more_seconds
        problem = None if outcome in ("equal", "said") else outcome
        self.keep(kind, name, recipe.label, outcome, said.replace(str(self.folder), ""), seconds, problem)
        if problem is None and not keep_folder:
            shutil.rmtree(folder, ignore_errors=True)
        return problem and f"{name} ({recipe.label}): {problem}"

    def _judged(self, ended, recipe, folder, undisturbed):
        """ "equal", "said", or what is wrong."""
        if ended.code is None:
            return "stuck: the process hangs"
        if ended.orphans:
            return f"lost: processes still run: {ended.orphans}"
        if ended.code == 0:
            different = differences(folder, recipe, undisturbed)
            return f"silent: {'; '.join(different)[:500]}" if different else "equal"
        if ended.code == 2 and len(ended.errors) == 1 and "Traceback" not in ended.err:
            return "said"
        return f"lost: exit code {ended.code}: {ended.err[-700:]}"

    def _follow(self, said, recipe, folder, mend, more, undisturbed, named):
        """Do what an error line says: "said" if that helps, or what is wrong; and the seconds that it took."""
        place, spent = Path(folder), 0.0
        for _ in range(2):  # a damaged image is brought back, and then the folder has a run of the damaged one
            if str(named or folder) not in said and "/dev/shm" not in said:
                return f"lost: the line does not name {named or folder}: {said}", spent
            if mend is not None:
                mend()
                mend = named = None
            elif "--overwrite true" in said:
                more = [*more, "--overwrite", "true"]
            elif any(words in said for words in OTHER_WORDS):
                place = self.new_folder()
            else:
                return f"lost: the line does not say what to do: {said}", spent
            ended = self.run(recipe, place, more)
            spent += ended.seconds
            outcome = self._judged(ended, recipe, place, undisturbed)
            if outcome != "said":
                return "said" if outcome == "equal" else outcome, spent
            said = ended.errors[0]
        return f"lost: what the lines say does not help: {said}", spent

    def keep(self, kind, name, recipe, outcome, said, seconds, problem=None):
        """Append a line to :data:`LOG`; of an outcome its first word."""
        LOG.parent.mkdir(exist_ok=True)
        outcome = outcome.partition(":")[0]
        entry = {"kind": kind, "name": name, "recipe": recipe, "outcome": outcome, "said": said, "commit": COMMIT}
        entry |= {"seconds": round(seconds, 2)} | ({"problem": problem} if problem else {})
        with LOG.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
