"""Which small changes of meaning do the tests notice? A seeded sample of mutants, kept in results/mutants.json.

    make mutants
    python benchmarks/mutants.py --count 40 --seed 5 --only linear/ --name ""

cosmic-ray makes the mutants: mutmut changes nothing but the bodies of functions without a decorator, so no constant, no
default of a dataclass, no property, and these were the changes that tests did not notice. cosmic-ray's own runner
starts an interpreter for each mutant, most of its time for imports; here one process forks (``forked_tests.py``).

The files are ``FILES``. A place in the code (an operator, a number, a comparison, a condition, a decorator, a loop) is
drawn at most once, the files by their number of places; then one change of that place. The draw is a hash of the seed
and of the place's own text, so a change elsewhere in the code draws the same mutants again. Annotations are left out.

A mutant is written into a copy of the tree; your files are never touched. First runs the test that noticed it before,
then those that run its line (coverage knows them from one run without mutants), of its file and the quickest of others,
then all tests of its file, until one fails. In the end every test that noticed something has to pass without a mutant.
A result is kept in ``--session`` until its file, or the test that noticed it, or (of a survivor) one of its tests
changes, so a second start goes on. A survivor needs a test, or in ``mutants_reasons.json`` the reason why it changes
nothing.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from forked_tests import PACKAGE, RECIPES, ROOT, WHOLE, Run, copied, import_libraries, without_a_mutant

REASONS = Path(__file__).with_name("mutants_reasons.json")
FILES = (
    *("noise/*.py", "linear/*.py", "cards/*.py", "hub/*.py", "study/analysis.py"),
    *(f"training/{name}.py" for name in ("losses", "objectives", "rounds", "checkpoints", "ema")),
    *(f"robustness/{name}.py" for name in ("scores", "corruptions", "corruption_functions", "suite", "checks")),
    "robustness/attacks/*.py",
)
# The tests of a file: those named after it, and these. All of them are run once to learn which lines each one runs.
TESTS = {
    "": ["test_defaults.py", "test_bad_input.py"],
    "linear/": ["invisible/test_images.py"],
    "noise/": ["noise/test_noise_on_hub.py", "noise/test_algorithm1.py", "training/test_rounds.py"],
    "noise/bank.py": ["training/test_noise_bank.py"],
    "noise/pictures.py": ["noise/test_pictures.py"],
    "cards/": ["cards/test_card.py", "hub/test_release.py", "cards/test_model_cards.py"],
    "hub/": ["cards/test_card.py", "hub/test_release.py", "cards/test_model_cards.py"],
    "hub/timm_vit.py": ["hub/test_convert.py", "test_published_tables.py"],
    "hub/convert.py": ["hub/test_checkpoint_files.py", "test_published_tables.py"],
    "hub/metric.py": ["hub/test_metric_space.py"],
    "training/objectives.py": ["training/test_config.py", "training/test_noise_bank.py", "training/test_trainer.py"],
    "training/rounds.py": ["training/test_noise_bank.py", "training/test_objectives.py"],
    "robustness/suite.py": ["robustness/test_two_processes.py"],
    "robustness/scores.py": ["robustness/test_metric.py"],
    "robustness/corruptions.py": ["robustness/test_corruption_functions.py", "test_published_tables.py"],
    "robustness/corruption_functions.py": ["robustness/test_corruptions.py", "test_published_tables.py"],
    "robustness/attacks/": ["robustness/test_every_attack.py", "robustness/test_gradient_attacks.py"],
    "robustness/attacks/base.py": ["robustness/test_carlini_wagner.py", "robustness/test_patch_fool.py"],
    "robustness/attacks/auto.py": ["robustness/test_auto_attack.py"],
}
MOST_OTHERS = 40  # tests of other files that run a line; of some lines it is every second test


def annotations(tree):
    """Where the annotations of a module stand: ((line, column), (line, column))."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if (found := getattr(node, name, None)) is not None:
                yield (found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)


def places(path):
    """(first and last position of a place) -> its mutants, as ``cosmic_ray`` gives them."""
    from cosmic_ray.commands.init import _all_work_items

    source = path.read_text(encoding="utf-8")
    typed = list(annotations(ast.parse(source)))
    found = defaultdict(list)
    for item in _all_work_items([path], {}):
        (spec,) = item.mutations
        if not any(first <= spec.start_pos and spec.end_pos <= last for first, last in typed):
            found[spec.start_pos, spec.end_pos].append(spec)
    return found


def rank(seed, *words):
    return hashlib.sha256(json.dumps([seed, *words]).encode()).hexdigest()


def sample(seed, count, only):
    """The mutants, as dictionaries: each file's share by its number of places, and one mutant for each place."""
    everything = {}
    found = [(root, path) for root in (PACKAGE, RECIPES) for pattern in FILES for path in (ROOT / root).glob(pattern)]
    for root, path in sorted(set(found)):
        name = path.relative_to(ROOT / root).as_posix()
        if not only or any(part in name for part in only):
            everything[name] = (path, places(path))
    total = sum(len(found) for _, found in everything.values())
    drawn = []
    for name, (path, found) in everything.items():
        lines, seen, ranked = path.read_text(encoding="utf-8").splitlines(), Counter(), []
        for (start, _), specs in sorted(found.items(), key=lambda one: one[0]):
            line = lines[start[0] - 1]
            text, column = line.strip(), start[1] - len(line) + len(line.lstrip())
            seen[text, column] += 1
            key = (name, text, column, seen[text, column])
            ranked.append((rank(seed, *key), key, specs, start))
        share = len(ranked) * count / total
        take = int(share) + (int(rank(seed, name)[:8], 16) / 16**8 < share % 1)
        for _, key, specs, start in sorted(ranked)[:take]:
            specs.sort(key=lambda spec, key=key: rank(seed, *key, spec.operator_name, spec.occurrence % 2))
            drawn += list(islice(filter(None, (described(name, path, spec, start) for spec in specs)), 1))
    return sorted(drawn, key=lambda mutant: rank(seed, mutant["id"]))


def described(name, path, spec, start):
    """A mutant as a dictionary, or None if it is no Python."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    source = path.read_text(encoding="utf-8")
    operator = cosmic_ray.plugins.get_operator(spec.operator_name)(**spec.operator_args)
    changed = mutate_code(source, operator, spec.occurrence)
    try:
        compile(changed, name, "exec")
    except SyntaxError:  # such as "not" before a ":="
        return None
    before, after = source.splitlines(), changed.splitlines()
    row = start[0] - 1
    rest = len(before) - row - 1
    now = after[row : len(after) - rest]
    mutant = {
        "file": name,
        "line": start[0],
        "in": spec.definition_name,
        "operator": spec.operator_name.removeprefix("core/"),
        "before": before[row].strip(),
        "after": " / ".join(line.strip() for line in now),
    }
    mutant["id"] = " | ".join((name, mutant["operator"], mutant["before"], mutant["after"]))
    return mutant | {"source": changed}


def file_of(name):
    """The path of a module, from the repository's root."""
    return f"{PACKAGE if (ROOT / PACKAGE / name).is_file() else RECIPES}/{name}"


def tests_of(name):
    """The test files of a module, those with its name first."""
    folder = "." if file_of(name).startswith(PACKAGE) else RECIPES
    own = sorted((ROOT / "tests" / folder / Path(name).parts[0]).rglob(f"test_{Path(name).name}"))
    more = [ROOT / "tests" / test for prefix, tests in TESTS.items() if name.startswith(prefix) for test in tests]
    return list(dict.fromkeys(path.relative_to(ROOT).as_posix() for path in [*own, *more]))


def learn(folder, tests, lines):
    """Run all tests once without a mutant: (file, line) -> the tests that run it, and each test's seconds.

    It decides about the order in which tests are tried and about nothing else, so an old one does.
    """
    import coverage

    print(f"running {len(tests)} test files without a mutant", flush=True)
    found = without_a_mutant(folder, tests, lines)
    data = coverage.CoverageData(str(lines))
    data.read()
    ran = defaultdict(dict)
    for path in data.measured_files():
        name = Path(path).relative_to(folder).as_posix().removeprefix(f"{PACKAGE}/").removeprefix(f"{RECIPES}/")
        for line, contexts in data.contexts_by_lineno(path).items():
            ran[name][line] = sorted(contexts)
    return {"seconds": found["seconds"], "ran": ran}


def confirm(folder, done, record):
    """Run every test that noticed a mutant without one; what a test noticed that fails then counts for nothing."""
    tests = sorted({one["by"] for one in done.values() if "::" in (one["by"] or "")})
    print(f"running the {len(tests)} tests that noticed something without a mutant", flush=True)
    red = set(without_a_mutant(folder, tests)["failed"])
    if red:
        kept = [one for one in done.values() if one["by"] not in red]
        record.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")
        raise SystemExit("these fail without a mutant; mend them and start again: " + " ".join(sorted(red)))


def chosen(mutant, known, before):
    """The tests for a mutant: the one that noticed it ``before``, those that run its line, and all of its file's."""
    seconds = known["seconds"]
    mine = sorted(tests_of(mutant["file"]), key=lambda test: known["of_file"][test])
    found = set()
    for context in known["ran"].get(mutant["file"], {}).get(str(mutant["line"]), []):
        whole = context.removeprefix(f"{WHOLE} ")
        found |= {test for test in seconds if test.startswith(f"{whole}::")} if whole != context else {context}
    first = [test for test in [before.get(mutant["id"])] if test in seconds]
    own = set(tests_of(mutant["file"]))
    near = sorted(found & set(seconds), key=seconds.get)
    others = [test for test in near if test.partition("::")[0] not in own][:MOST_OTHERS]
    return ["-x", *first, *(test for test in near if test.partition("::")[0] in own), *others, *mine]


def read(path):
    """id -> result, of a session's file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {one["id"]: one for one in map(json.loads, lines)}


def state(mutant, test):
    """What a result depends on: the file that is changed, and the test that noticed it, or all tests of that file."""
    tests = [test.partition("::")[0]] if test and "::" in test else tests_of(mutant["file"])
    return hashlib.sha256("".join(content(path) for path in (file_of(mutant["file"]), *tests)).encode()).hexdigest()


@cache
def content(path):
    """The hash of a file as it was when it was first asked for, which is before the copies are made."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def run_all(mutants, folders, known, session):
    """Run the mutants that have no result in the session yet, one in each folder at a time."""
    record = session / "results.jsonl"
    known_results = read(record)
    before = {name: one["by"] for name, one in known_results.items()}
    current = {one["id"]: one for one in mutants}
    done = {
        name: one
        for name, one in known_results.items()
        if name in current and one["of"] == state(current[name], one["by"])
    }
    waiting = [mutant for mutant in reversed(mutants) if mutant["id"] not in done]
    free, busy, stamp = list(folders), {}, 1
    begun, all_of_them = time.monotonic(), len(waiting)
    while waiting or busy:
        while waiting and free:
            mutant, folder = waiting.pop(), free.pop()
            path = folder / file_of(mutant["file"])
            path.write_text(mutant["source"], encoding="utf-8")
            os.utime(path, (stamp, stamp))  # so that no compiled file is taken for it
            stamp += 1
            limit = 60 + 3 * sum(known["of_file"][test] for test in tests_of(mutant["file"]))
            busy[folder] = mutant, Run(folder, chosen(mutant, known, before), limit)
        time.sleep(0.02)
        for folder, (mutant, run) in list(busy.items()):
            if (found := run.result()) is None:
                continue
            del busy[folder]
            free.append(folder)
            shutil.copy2(ROOT / file_of(mutant["file"]), folder / file_of(mutant["file"]))
            outcome, test = found
            took = round(time.monotonic() - run.begun, 1)
            done[mutant["id"]] = {"id": mutant["id"], "outcome": outcome, "by": test, "seconds": took,
                                  "of": state(mutant, test)}  # fmt: skip
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[mutant["id"]]) + "\n")
            left = len(waiting) + len(busy)
            print(f"{all_of_them - left}/{all_of_them} {outcome:8} {took:6.1f} s  {mutant['file']}:{mutant['line']}  "
                  f"{mutant['before']}  ->  {mutant['after']}", flush=True)  # fmt: skip
    print(f"{time.monotonic() - begun:.0f} s")
    confirm(folders[0], done, record)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=420, help="mutants, roughly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="parts of file names, such as linear/ or scores.py")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--session", type=Path, default=ROOT / "outputs" / "mutants")
    parser.add_argument("--name", default="mutants", help='of the JSON in benchmarks/results; "" writes none')
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", "src", RECIPES], cwd=ROOT, capture_output=True, text=True
    )
    mutants = sample(args.seed, args.count, args.only)
    names = sorted({mutant["file"] for mutant in mutants})
    tests = list(dict.fromkeys(test for name in names for test in tests_of(name)))
    for path in (*tests, *map(file_of, names)):
        content(path)
    args.session.mkdir(parents=True, exist_ok=True)
    print(f"{len(mutants)} mutants in {len(names)} files", flush=True)
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        folders = [copied(Path(root).resolve() / str(number)) for number in range(args.workers)]
        present = set(without_a_mutant(folders[0], ["--collect-only", *tests])["tests"])
        if not (args.session / "known.json").is_file():
            (args.session / "known.json").write_text(json.dumps(learn(folders[0], tests, args.session / "lines")))
        known = json.loads((args.session / "known.json").read_text())
        known["seconds"] = {test: seconds for test, seconds in known["seconds"].items() if test in present}
        known["of_file"] = defaultdict(float)
        for test, seconds in known["seconds"].items():
            known["of_file"][test.partition("::")[0]] += seconds
        done = run_all(mutants, folders, known, args.session)
    report(args, commit.stdout.strip(), mutants, done)


def report(args, commit, mutants, done):
    """Print what survived, and write the result."""
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.is_file() else {}
    rows = []
    for mutant in mutants:
        found = done[mutant["id"]]
        row = {key: mutant[key] for key in ("file", "line", "operator", "before", "after")}
        row |= {"outcome": found["outcome"], "by": found["by"], "seconds": found["seconds"]}
        if found["outcome"] == "survived":
            row["reason"] = reasons.get(mutant["id"])
        rows.append(row)
    outcomes = Counter(row["outcome"] for row in rows)
    share = 100 * (1 - outcomes["survived"] / len(rows))
    bare = [mutant["id"] for mutant, row in zip(mutants, rows, strict=True) if row.get("reason", "") is None]
    print(f"\n{dict(outcomes)} of {len(rows)}: {share:.1f}% noticed; {len(bare)} survived without a reason")
    print(*bare, sep="\n")
    if args.name:
        result = {
            "command": " ".join(["python benchmarks/mutants.py", *sys.argv[1:]]),
            "commit": commit,
            "seed": args.seed,
            "versions": {name: version(name) for name in ("cosmic-ray", "coverage", "pytest", "torch", "transformers")},
            "python": sys.version.split()[0],
            "mutants": len(rows),
            "outcomes": dict(outcomes),
            "noticed_percent": round(share, 2),
            "survived_without_a_reason": len(bare),
            "seconds": round(sum(row["seconds"] for row in rows)),
            "results": sorted(rows, key=lambda row: (row["file"], row["line"], row["after"])),
        }
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name} is in {path.parent.name}")


if __name__ == "__main__":
    main()
