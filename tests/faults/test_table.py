"""What docs/reliability.md says of the campaign is what its results say."""

import json

from table import PAGE, RESULTS, counts, with_table, without_places


def test_the_page_has_the_table_of_the_results():
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, content["faults"]) == page
    assert {kind: dict(found) for kind, found in counts(content["faults"]).items()} == content["kinds"]
    assert content["tried"] == len(content["faults"]) >= 150
    assert set(content["outcomes"]) == {"equal", "said"}
    assert all(fault["said"] for fault in content["faults"] if fault["outcome"] == "said")


def test_lines_are_kept_without_the_machine():
    said = "error: /a/b/run-1/base is in use by process 12 on host, started 2026-01-01 00:00:00. Wait, fgsm 8/255"
    assert without_places(said) == "error: base is in use by process N on HOST, started TIME. Wait, fgsm 8/255"
