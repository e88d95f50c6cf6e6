"""Plans: what the named suites hold, and what a file of one's own means."""

from hf_nullspace.robustness.attacks.carlini_wagner import CW
from hf_nullspace.robustness.attacks.gradient import FGSM, MIM, PGD
from hf_nullspace.robustness.attacks.patch_fool import PatchFool
from hf_nullspace.robustness.plans import load_plan
from hf_nullspace.robustness.suite import Attacked, Clean, Corrupted
from hf_nullspace.robustness.summaries import CIFAR_COLUMNS, IMAGENET_COLUMNS


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_named_suites():
    quick, standard, paper = (load_plan(name) for name in ("quick", "standard", "paper"))
    assert len(quick) == 6
    assert all(planned.limit == 500 for planned in quick)
    assert len(standard) == 1 + 5 + 3 + 1 + 75
    assert {str(planned.condition) for planned in standard} >= set(CIFAR_COLUMNS)
    titles = [planned.title for planned in paper]
    assert len(titles) == 5 + 6 + 75
    assert set(titles) >= set(IMAGENET_COLUMNS.values())
    attacks = [planned.condition.attack for planned in paper if isinstance(planned.condition, Attacked)]
    assert attacks == [PatchFool(), CW(), MIM(), FGSM()]


def test_a_plan_of_ones_own(tmp_path):
    plan = load_plan(
        write(
            tmp_path,
            """
limit: 100
conditions:
  - clean
  - {attack: PGD, eps: 0.5, norm: l2, steps: 3, limit: 20}
  - {attack: MIM, eps: 4/255, step: 0.5/255}
  - {corruption: [fog, snow], severity: [1, 5]}
  - {set: imagenet-a, limit: 7}
  - {set: imagenet-v2, attack: FGSM}
  - {set: cifar10-c}
  - {dataset: some/folder}
  - {dataset: some/folder, corruption: fog, severity: 1}
""",
        )
    )
    assert plan[0].condition == Clean()
    assert plan[1].condition == Attacked(PGD(0.5, norm="l2", steps=3))
    assert (plan[0].limit, plan[1].limit) == (100, 20)
    assert plan[2].condition == Attacked(MIM(4 / 255, step=0.5 / 255))
    assert [p.condition for p in plan[3:7]] == [Corrupted(c, s) for c in ("fog", "snow") for s in (1, 5)]
    assert (plan[7].title, plan[7].limit) == ("imagenet-a", 7)
    assert plan[8].title == "imagenet-v2: FGSM(eps=1/255)"
    assert len(plan) == 9 + 75 + 2
    assert [p.title for p in plan[-2:]] == ["some/folder", "some/folder: generated fog 1"]
