"""The table of a campaign: this file, run, makes benchmarks/results/faults.json and the table of docs/reliability.md.

Of a fault that was tried more than once the last time counts.
"""

import json
import os
import platform
import re
from collections import Counter
from pathlib import Path

from hf_nullspace.core.files import write_json, write_whole
from hf_nullspace.robustness.records import versions

ROOT = Path(__file__).parents[2]
LOG = ROOT / "outputs" / "faults.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
COMMAND = "make faults"
BEGIN, END = "<!-- table of faults.json -->\n", "<!-- end of the table -->\n"


def read(path):
    """The last entry of each fault of a file of JSON lines, by kind, recipe and name."""
    entries = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    last = {(entry["kind"], entry["recipe"], entry["name"]): entry for entry in entries}
    return [last[key] for key in sorted(last)]


def counts(faults):
    """Kind -> how many faults ended how."""
    found = {}
    for fault in faults:
        found.setdefault(fault["kind"], Counter())[fault["outcome"]] += 1
    return dict(sorted(found.items()))


def markdown(faults):
    """A row per kind, and the sum."""
    rows = ["| fault | tried | equal | said | lost, silent, stuck |", "| --- | ---: | ---: | ---: | ---: |"]
    kinds = counts(faults)
    for kind, found in [*kinds.items(), ("**all**", sum(kinds.values(), Counter()))]:
        good = found["equal"] + found["said"]
        rows.append(f"| {kind} | {found.total()} | {found['equal']} | {found['said']} | {found.total() - good} |")
    return "\n".join(rows) + "\n"


def with_table(page, faults):
    """The page with the table of these faults between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + markdown(faults) + END + rest.partition(END)[2]


def without_places(text):
    """A line that was said without the folders, the name and the clock of a machine."""
    text = re.sub(r"process \d+ on \S+, started [\d: -]+", "process N on HOST, started TIME", text)
    return re.sub(r"(?<![\w.])/[\w./-]*/(?=[\w.-]+)", "", text)


def main():
    faults = [{**fault, "said": without_places(fault["said"])} for fault in read(LOG)]
    content = {
        "command": COMMAND,
        "commits": sorted({fault["commit"] for fault in faults}),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": versions(),
        "tried": len(faults),
        "outcomes": dict(Counter(fault["outcome"] for fault in faults)),
        "kinds": {kind: dict(found) for kind, found in counts(faults).items()},
        "faults": faults,
    }
    write_json(RESULTS, content)
    page = with_table(PAGE.read_text(encoding="utf-8"), faults)
    write_whole(PAGE, lambda path: path.write_text(page, encoding="utf-8") and None)
    print(markdown(faults))


if __name__ == "__main__":
    main()
