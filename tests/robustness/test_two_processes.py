"""103 images on two real processes (gloo): every image once, the same counts as on one, whatever the batch size."""

import json
import socket

import evaluate
import pytest
import run_evaluation
import torch

from forked import start

LIMIT_S = 120


def launch(processes, folder):
    """What each rank got, and what they printed; one process is this one."""
    folder.mkdir()
    if processes == 1:
        with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
            run_evaluation.main(folder)
        return [json.loads((folder / "rank-0.json").read_text())], ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what torchrun sets
    running, logs = [], [folder / f"log-{rank}.txt" for rank in range(processes)]
    for rank, log in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(start(run_evaluation.main, folder, log=log, environment=group | ranks))
    for process in running:
        process.join(LIMIT_S)
    said = "\n".join(log.read_text() for log in logs)
    assert [process.exitcode for process in running] == [0] * processes, said[-3000:]
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(processes)], said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return launch(1, folder / "one"), launch(2, folder / "two")


def test_counts_are_those_of_one_process(runs):
    (alone,), _ = runs[0]
    first, second = runs[1][0]
    for name in ("seven", "all", "stream", "memory", "resumed"):
        for condition, correct in alone[name].items():
            assert len(correct) == 103
            assert 0 < sum(correct) < 103
            assert first[name][condition] == second[name][condition] == correct, (name, condition)
    assert alone["seven"] == alone["all"] == alone["stream"] == alone["memory"]
    assert alone["resumed"]["clean"] == alone["seven"]["clean"]


def test_the_metric_pools_on_process_0(runs):
    (alone,), _ = runs[0]
    first, second = runs[1][0]
    assert first["metric"] == alone["metric"] == sum(alone["seven"]["clean"]) / 103
    assert second["metric"] is None


def test_one_progress_bar_on_the_main_process(runs):
    _, said = runs[1]
    done = [line for line in said.replace("\r", "\n").splitlines() if "0%|" in line and "clean" in line]
    assert len(done) <= 2
    assert "fwd" in said
