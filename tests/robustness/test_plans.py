"""Plans: what the named suites hold, and what a typo says."""

import pytest

from hf_nullspace.command_line import UsageError
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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("cleen", "'cleen' is no condition"),
        ("{attack: PGDD}", "unknown attack 'PGDD'; did you mean PGD"),
        ("{attack: FGSM, epsilon: 1}", "unknown key 'epsilon'; did you mean eps"),
        ("{attack: FGSM, eps: a/255}", "'a/255': expected a number like"),
        ("{attack: FGSM, eps: 8}", "expected a radius"),
        ("{corruption: fogg}", "unknown corruption 'fogg'; did you mean fog\\?"),
        ("{corruption: fog, severity: 6}", "severity=6 of fog: expected 1 to 5"),
        ("{corruption: fog, severity: 2.0}", "severity=2.0 of fog"),
        ("{corruption: fog, severity: true}", "severity=True of fog"),
        ("{attack: [PGD]}", "unknown attack"),
        ("{set: [imagenet]}", "unknown set"),
        ("{attack: PGD, steps: 2.5}", "steps=2.5: expected at least 1"),
        ("{attack: PGD, random_start: 1}", "random_start=1: expected True or False"),
        ("{corruption: fog, limit: 0}", "limit 0; expected a whole number of at least 1"),
        ("{corruption: fog, severty: 1}", "did you mean severity"),
        ("{set: imagenet-b}", "unknown set 'imagenet-b'; did you mean imagenet"),
        ("{set: imagenet-a, clen: true}", "unknown key 'clen'; did you mean clean"),
    ],
)
def test_a_typo_names_the_nearest_word(tmp_path, entry, message):
    with pytest.raises(UsageError, match=message):
        load_plan(write(tmp_path, f"conditions:\n  - {entry}\n"))


def test_bad_files(tmp_path):
    with pytest.raises(UsageError, match="expected quick, standard, paper, or a YAML file"):
        load_plan("qick")
    with pytest.raises(UsageError, match="expected a list 'conditions'"):
        load_plan(write(tmp_path, "condition: []"))
    with pytest.raises(UsageError, match="did you mean limit"):
        load_plan(write(tmp_path, "conditions: []\nlimits: 3"))
    for content in ("conditions:\n\t- clean", "conditions: !!python/object:os.system []", "limit: 1\nlimit: 2"):
        with pytest.raises(UsageError, match="no valid YAML"):
            load_plan(write(tmp_path, content))
    with pytest.raises(UsageError, match="is empty"):
        load_plan(write(tmp_path, "conditions: []"))
    with pytest.raises(UsageError, match="given twice: clean"):
        load_plan(write(tmp_path, "conditions: [clean, clean]"))
