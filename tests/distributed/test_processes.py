"""NullspaceTrainer on real processes (gloo): the same run on one process and on two, and what breaks one rank of two.

One pair of processes does several runs (``run_training.py``), and each test looks at one of them. The first pair is
forked from a server, with what a launcher sets; the one that resumes is launched as the README says. float64 and no
dropout, so that what differs is rounding: about 1e-16 per operation.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import run_training
import torch

import torchvision_here
from forked import start as fork
from tiny_models import FAMILIES, tiny_model

HERE = Path(__file__).parent
WORKER = HERE / "run_training.py"
ACCELERATE_CONFIGS = HERE.parents[1] / "recipes" / "accelerate"
LIMIT_S = 240
"""More than any launch here takes, so that a deadlock fails a test and does not hang it."""

N_D = 16 * 24  # patches x features of the tiny model

RANDOM = {
    "objective": "random+madry+trades+fast+pyramid+fgm+universal",
    "epsilon": 0.005,
    "attack_steps": 2,
    "held_out_images": 21,
}
BANK = {"preset": "boundary", "noise_max_steps": 5, "noise_pool_images": 14, "noises_at_once": 2, "noise_bank_size": 3,
        "noise_mix": "convex", "epsilon": 0.005}  # fmt: skip
ADVERSARIAL = {"name": "adversarial", "pixels": True, "settings": RANDOM}
ACCUMULATED = ADVERSARIAL | {"name": "adversarial_accumulated", "settings": RANDOM | {"gradient_accumulation_steps": 2}}
BOTH: list[dict[str, Any]] = [
    ADVERSARIAL,
    {"name": "bank", "settings": BANK},
    {"name": "minibatch", "settings": {"noise_stop_on": "minibatch", "epsilon": 0.02}},
    {"name": "stream_dispatched", "streaming": True, "settings": {"objective": "plain"}},
    {"name": "interpolated", "settings": {"interpolate": True, "objective": "nullspace", "ema_decay": 0.9}},
    {"name": "ema", "evaluate": True, "settings": {"ema_decay": 0.9}},
    {"name": "bf16", "dtype": "float32", "settings": {"bf16": True}},
    *([{"name": "augmented", "pixels": "augmented", "settings": RANDOM}] if torchvision_here.HERE else []),
]
"""On one process and on two."""
BY_SHARDS = {"objective": "plain", "accelerator_config": {"dispatch_batches": False}}
SEVERAL: list[dict[str, Any]] = [
    *BOTH,
    ACCUMULATED,
    {"name": "every_step_saved", "settings": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}},
    {"name": "stream", "streaming": True, "settings": {"noise_on_limit": "rescale"}},
    {"name": "stream_by_shards", "streaming": True, "settings": BY_SHARDS},
    {"name": "not_a_number", "fails": True, "trouble": {"round": 1, "rank": 1, "after": 12, "what": "nan"}},
    {"name": "not_learned", "fails": True, "settings": {"epsilon": 0.001, "noise_max_steps": 3}},
    {"name": "few_held_out", "fails": True, "settings": {"held_out_images": 1}},
    {"name": "few_images", "fails": True, "settings": {"noise_batch_size": 1}},
]
ALONE: list[dict[str, Any]] = [
    *BOTH,
    ACCUMULATED,
    {"name": "one_by_eight"},
    {"name": "accumulated", "settings": {"gradient_accumulation_steps": 2}},
]
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
KILLED = {  # on both ranks, while the noise of the second round is learned
    "name": "killed",
    "settings": CHECKPOINTS,
    "trouble": {"round": 1, "rank": "all", "after": 20, "what": "kill"},
}
RESUMED = {"name": "resumed", "output": "killed", "resume": True, "settings": CHECKPOINTS}
CORRUPT = {"name": "corrupt", "trouble": {"round": 1, "rank": 1, "after": 20, "what": "corrupt"}}


@dataclass
class Launch:
    """What came of a launch."""

    folder: Path
    output: str
    code: int
    seconds: float

    def result(self, name: str, rank: int = 0) -> dict[str, Any]:
        """What one rank ended a run with."""
        path = self.folder / name / f"rank-{rank}.pt"
        assert path.exists(), f"{name} did not end on rank {rank}; the launch said:\n{self.output[-8000:]}"
        return torch.load(path, weights_only=False)

    def results(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both ranks ended a run with."""
        return self.result(name, 0), self.result(name, 1)


def launch(launcher: list[str], cases: list[dict[str, Any]], folder: Path) -> Launch:
    """Run the worker under ``launcher``."""
    (folder / "cases.json").write_text(json.dumps(cases))
    return start([*launcher, str(WORKER), str(folder / "cases.json"), str(folder)], folder)


def start(words: list[str], folder: Path) -> Launch:
    """Run ``python -m words``; everything that it started is dead afterwards."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *words]
    begin = time.perf_counter()
    log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its workers
            process.wait(30)
    seconds = time.perf_counter() - begin
    return Launch(folder, log.read_text(), process.returncode, seconds)


def accelerate(config: Path) -> list[str]:
    return ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]


TWO = accelerate(ACCELERATE_CONFIGS / "cpu_2proc.yaml")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The runs on one process: this one."""
    folder = tmp_path_factory.mktemp("one")
    run_training.run_all(ALONE, folder)
    return Launch(folder, "", 0, 0.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The runs on two processes; in the last of them they are killed."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    begin, log, processes = time.perf_counter(), folder / "output.txt", []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        processes.append(fork(run_training.run_all, [*SEVERAL, KILLED], folder, log=log, environment=group | ranks))
    for process in processes:
        process.join(max(LIMIT_S + begin - time.perf_counter(), 0))
        process.kill()
        process.join()
    # Of the killed ones; the other rank may see the connection end before its own end.
    code = min(process.exitcode for process in processes)
    return Launch(folder, log.read_text(), code, time.perf_counter() - begin)


@pytest.fixture(scope="module")
def resumed(two: Launch) -> tuple[list[str], Launch]:
    """What the killed run left, and the launch that resumed it; after that it meets a corrupt image."""
    left = sorted(str(path.relative_to(two.folder / "killed")) for path in (two.folder / "killed").rglob("*"))
    return left, launch(TWO, [RESUMED, CORRUPT], two.folder)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of parameters, relative to each parameter's norm, or to 1e-3 where that is less.

    The bias of the attention's keys needs this floor: softmax cancels it, so that it moves by rounding alone.
    """
    assert ours.keys() == theirs.keys()
    differences = [torch.linalg.vector_norm(ours[name] - theirs[name]) for name in ours]
    norms = [torch.linalg.vector_norm(theirs[name]).clamp(min=1e-3) for name in ours]
    return max(float(d / n) for d, n in zip(differences, norms, strict=True))


def together(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All parameters as one vector."""
    return {"all": torch.cat([parameter.flatten() for parameter in parameters.values()])}


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def steps(result: dict[str, Any]) -> list[int]:
    return [entry["noise_steps"] for entry in result["history"]]


def without_seconds(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def curves(result: dict[str, Any]) -> list[dict[str, Any]]:
    return without_seconds(result["history"])


def check_ranks_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two ranks of one run hold the same, bit for bit."""
    assert first["processes"] == second["processes"] == 2
    assert torch.equal(first["noise"], second["noise"])
    assert curves(first) == curves(second)
    assert same_bits(first["parameters"], second["parameters"])
    assert same_bits(first["average"], second["average"])
    assert same_bits(first["state"], second["state"])


def check_same_end(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two runs end with the same parameters and noises, but for rounding."""
    assert difference(ours["parameters"], theirs["parameters"]) < 1e-6
    assert len(ours["noises"]) == len(theirs["noises"]) == 3
    for our, their in zip(ours["noises"], theirs["noises"], strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-9)


def test_one_process_two_processes_and_accumulation_end_with_the_same_parameters(one: Launch, two: Launch) -> None:
    """7 images per noise step and 21 held out: on two processes the shares are 4 and 3, 11 and 10."""
    by_eight, others = one.result("one_by_eight"), (one.result("accumulated"), two.result("every_step_saved"))
    assert [run["processes"] for run in (by_eight, *others)] == [1, 1, 2]
    assert all(count > 0 for count in steps(by_eight))
    for other in others:
        check_same_end(other, by_eight)
        assert other["global_step"] == by_eight["global_step"] == 6
        assert steps(other) == steps(by_eight)
        for ours, theirs in zip(curves(other), curves(by_eight), strict=True):
            assert ours["influence"] == pytest.approx(theirs["influence"], rel=1e-6)
            assert ours["trace"]["influence"] == pytest.approx(theirs["trace"]["influence"], rel=1e-5)
        assert other["provenance"]["influence_images"] == by_eight["provenance"]["influence_images"] == 21
    before = {name: parameter.detach() for name, parameter in tiny_model().double().named_parameters()}
    assert difference(by_eight["parameters"], before) > 1e-3, "else the comparisons of this file would say nothing"


def test_attacks_and_controls_do_not_depend_on_processes_or_accumulation(one: Launch, two: Launch) -> None:
    alone, (first, second) = one.result("adversarial"), two.results("adversarial")
    check_ranks_agree(first, second)
    assert first["messages"][(N_D + 2, 8)] == 6, "the universal noise's gradient, once per optimizer step"
    for other in (one.result("adversarial_accumulated"), two.result("adversarial_accumulated"), first):
        check_same_end(other, alone)
        assert [entry["stopped"] for entry in other["history"]] == ["calibrated"] * 3
        ours, theirs = (without_seconds(run["cost"]["stages"].values()) for run in (other, alone))
        assert ours == theirs
        assert [entry["step"] for entry in other["watched"]] == [0, 2, 4, 6]
        assert other["watched"] == alone["watched"]
        assert difference(other["state"], alone["state"]) < 1e-6
    assert alone["cost"]["stages"]["training"]["forward"] == 6 * 8 * 8
    assert alone["cost"]["stages"]["attack"]["backward_to_input"] == 6 * 8 * (2 + 2 + 1 + 2)


@pytest.mark.skipif(not torchvision_here.HERE, reason="torchvision is not installed")
def test_mixed_images_do_not_depend_on_processes(one: Launch, two: Launch) -> None:
    """AugMix, mixup and CutMix: what is drawn, the attacks on mixed images, and the loss with class probabilities."""
    alone, (first, second) = one.result("augmented"), two.results("augmented")
    check_ranks_agree(first, second)
    check_same_end(first, alone)
    assert first["watched"] == alone["watched"]
    ours, theirs = (without_seconds(run["cost"]["stages"].values()) for run in (first, alone))
    assert ours == theirs
    assert ours == without_seconds(one.result("adversarial")["cost"]["stages"].values()), "augmentation adds no pass"


def test_several_processes_choose_the_same_alpha_as_one(one: Launch, two: Launch) -> None:
    alone, (first, second) = one.result("interpolated"), two.results("interpolated")
    check_ranks_agree(first, second)
    check_same_end(first, alone)
    assert first["chosen"] == second["chosen"] == alone["chosen"]
    assert alone["chosen"]["count"] == 21
    assert difference(first["average"], alone["average"]) < 1e-6
    torch.testing.assert_close(first["noise"], alone["noise"], rtol=1e-6, atol=1e-9)
    ours, theirs = (run["cost"]["stages"]["selection"]["forward"] for run in (first, alone))
    assert ours == theirs == 2 * 3 * 21 * 5  # models, alphas, images, passes


def test_noises_learned_at_once_and_kept_do_not_depend_on_processes(one: Launch, two: Launch) -> None:
    alone, (first, second) = one.result("bank"), two.results("bank")
    check_ranks_agree(first, second)
    check_same_end(first, alone)
    assert [len(entry["bank"]) for entry in first["history"]] == [2, 3, 3]
    # A step sends one message: of each of two noises the gradient and three numbers.
    assert first["messages"][(2 * (N_D + 3), 8)] == 3 * 5


@pytest.mark.parametrize("name", ["every_step_saved", "minibatch", "stream", "ema", "bf16"])
def test_both_ranks_end_with_the_same_noise_and_parameters(one: Launch, two: Launch, name: str) -> None:
    first, second = two.results(name)
    check_ranks_agree(first, second)
    assert first["global_step"] == second["global_step"] == 6
    assert len(first["noises"]) == 3
    assert torch.equal(first["noises"][-1], first["noise"])
    if name in ("every_step_saved", "minibatch"):
        alone = one.result("one_by_eight" if name == "every_step_saved" else name)
        assert [entry["stopped"] for entry in first["history"]] == ["epsilon"] * 3
        assert steps(first) == steps(second) == steps(alone)
        assert max(steps(first)) > 5
        assert difference(first["parameters"], alone["parameters"]) < 1e-6


def test_a_noise_step_sends_one_message_of_n_d_plus_3_numbers(two: Launch) -> None:
    """And a round a few single numbers: how many images are held out, and their influence when it is looked at."""
    for name, held_out in (("every_step_saved", True), ("minibatch", False)):
        for result in two.results(name):
            messages = result["messages"]
            looks = sum(steps(result)) + 3  # the batch at which a round stops is measured and takes no step
            assert messages.pop((N_D + 3, 8)) == looks
            (size, singles), *others = messages.items()
            assert (size, others) == ((1, 8), [])
            assert 6 <= singles <= (3 + looks if held_out else 6)


def test_ema_is_the_same_on_one_process_and_on_two(one: Launch, two: Launch) -> None:
    ours, theirs = two.result("ema"), one.result("ema")
    assert difference(ours["average"], theirs["average"]) < 1e-6
    assert not same_bits(ours["average"], ours["parameters"])
    for name in ("eval_loss", "eval_ema_loss"):
        assert ours["metrics"][name] == pytest.approx(theirs["metrics"][name], rel=1e-6)
    assert ours["metrics"]["eval_loss"] != ours["metrics"]["eval_ema_loss"]


def test_bf16_is_near_on_one_process_and_on_two(one: Launch, two: Launch) -> None:
    """bfloat16 has 8 bits: the same sum in another order differs in the third digit, and AdamW divides by its size."""
    first, alone = two.result("bf16"), one.result("bf16")
    assert all(parameter.dtype == torch.float32 for parameter in first["parameters"].values())
    assert first["noise"].dtype == torch.float32
    assert difference(together(first["parameters"]), together(alone["parameters"])) < 5e-3


def test_every_rank_reports_a_loss_that_is_not_a_number(two: Launch) -> None:
    """The image that is NaN lies on rank 1."""
    errors = [result["error"] for result in two.results("not_a_number")]
    for error in errors:
        assert "FloatingPointError: round 1, after 2 optimizer steps: noise step 0: influence nan" in error
    assert ["the images (pixel_values) are" in error for error in errors] == [False, True]
    assert "the logits with the noise are (or a tensor of another process)" in errors[0]


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "not_learned",
            ["NoiseNotLearnedError: 3 steps left the influence at", "held-out images; epsilon is 0.001"],
        ),
        ("few_held_out", ["1 held-out images", "raise held_out_images"]),
        ("few_images", ["noise_batch_size=1 is less than one image per process"]),
    ],
)
def test_every_rank_reports_why_a_run_ends(two: Launch, name: str, messages: list[str]) -> None:
    for result in two.results(name):
        assert [message for message in messages if message not in result["error"]] == []


def test_who_reads_a_stream(one: Launch, two: Launch) -> None:
    """By default rank 0 reads for all, as accelerate does it; undispatched, every rank reads shards of its own."""
    first, second = two.results("stream_dispatched")
    assert second["read"] == []
    assert first["read"][:48] == one.result("stream_dispatched")["read"][:48]  # 6 steps of 8 images
    assert difference(first["parameters"], one.result("stream_dispatched")["parameters"]) < 1e-6
    first, second = two.results("stream_by_shards")
    assert len(first["read"]) >= 24
    assert len(second["read"]) >= 24
    assert not set(first["read"]) & set(second["read"])
    assert same_bits(first["parameters"], second["parameters"])


def test_a_run_of_two_processes_resumes_exactly_after_sigkill(two: Launch, resumed: tuple[list[str], Launch]) -> None:
    left, after = resumed
    assert two.code == -signal.SIGKILL, two.output[-8000:]
    assert not any(path.startswith("rank-") for path in left)
    assert "run/checkpoint-2/rng_state_1.pth" in left
    assert "run/noises/round-001.safetensors" not in left
    for rank in (0, 1):
        ours, never_killed = after.result("resumed", rank), two.result("every_step_saved", rank)
        assert same_bits(ours["parameters"], never_killed["parameters"])
        assert all(torch.equal(a, b) for a, b in zip(ours["noises"], never_killed["noises"], strict=True))
        assert curves(ours) == curves(never_killed)
        # It went on from the checkpoint: the noise of round 0 was not learned again.
        assert ours["messages"][(N_D + 3, 8)] == sum(steps(ours)[1:]) + 2


def test_an_error_on_one_rank_ends_both_soon_with_its_message(resumed: tuple[list[str], Launch]) -> None:
    """Rank 1 cannot read an image while rank 0 waits for its gradient: the launcher ends both."""
    _, after = resumed
    assert after.code != 0
    assert "OSError: image file is truncated (on rank 1)" in after.output
    assert not list((after.folder / "corrupt").glob("rank-*.pt"))
    assert after.seconds < LIMIT_S


@pytest.mark.slow
def test_a_compiled_model_on_two_processes_ends_with_the_same_parameters(tmp_path: Path) -> None:
    """Slow: the compiler takes 10 seconds to trace the wrapped model and the one that the noise is learned on."""
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = launch(TWO, [{"name": "compiled", "settings": settings}, {"name": "as_is"}], tmp_path)
    assert compiled.code == 0, compiled.output[-8000:]
    first, second = compiled.results("compiled")
    check_ranks_agree(first, second)
    assert difference(first["parameters"], compiled.result("as_is")["parameters"]) < 1e-6


@pytest.mark.slow
def test_every_family_on_two_processes(tmp_path: Path) -> None:
    """Slow: eight models. Some have parameters that get no gradient, which DDP has to be told."""
    settings = {"rounds": 1, "noise_max_steps": 3, "noise_on_limit": "rescale"}
    families = launch(TWO, [{"name": family, "family": family, "settings": settings} for family in FAMILIES], tmp_path)
    assert families.code == 0, families.output[-8000:]
    for family in FAMILIES:
        check_ranks_agree(*families.results(family))


@pytest.mark.slow
def test_fsdp2_ends_with_the_same_parameters_as_one_process(one: Launch, tmp_path: Path) -> None:
    """Slow: two more launches. The shipped configuration, but on the CPU, in float64, with two processes."""
    text = (ACCELERATE_CONFIGS / "fsdp2.yaml").read_text()
    for ours, theirs in (("use_cpu: false", "use_cpu: true"), ("processes: 8", "processes: 2"), (": bf16", ': "no"')):
        assert ours in text
        text = text.replace(ours, theirs)
    config = tmp_path / "fsdp2_cpu.yaml"
    config.write_text(text)
    killed = KILLED | {"trouble": KILLED["trouble"] | {"round": 2}}
    attacked = {"name": "attacked", "pixels": True, "settings": RANDOM | {"objective": "random+madry+trades"}}
    whole = [{"name": name, "fails": True, "settings": {"objective": name}} for name in ("fgm", "universal")]
    begun = launch(accelerate(config), [{"name": "sharded", "save": True}, attacked, *whole, killed], tmp_path)
    first, second = begun.results("sharded")
    check_ranks_agree(first, second)
    assert "DTensor" in first["kind"]
    assert steps(first) == steps(one.result("one_by_eight"))
    assert difference(first["parameters"], one.result("one_by_eight")["parameters"]) < 1e-6
    run_training.run_all([attacked], one.folder)
    sharded, alone = begun.result("attacked"), one.result("attacked")
    assert difference(sharded["parameters"], alone["parameters"]) < 1e-6
    for stage in ("training", "attack"):
        assert sharded["cost"]["stages"][stage]["forward"] == alone["cost"]["stages"][stage]["forward"]
    for result in (*begun.results("fgm"), *begun.results("universal")):
        assert "not supported with FSDP and DeepSpeed; use DDP" in result["error"]

    from transformers import AutoModelForImageClassification

    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "sharded" / "run", dtype=torch.float64)
    assert same_bits({name: p.detach() for name, p in saved.named_parameters()}, first["parameters"])

    assert begun.code != 0
    after = launch(accelerate(config), [RESUMED], tmp_path)
    for resumed in after.results("resumed"):
        assert same_bits(resumed["parameters"], first["parameters"])
        assert resumed["messages"][(N_D + 3, 8)] == steps(resumed)[2] + 1
