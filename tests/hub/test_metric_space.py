"""The metric as a Space: self-contained, loaded from a folder that was pulled and from the Hub, the same numbers."""

import re
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from huggingface_hub import snapshot_download

from hf_nullspace import metric_folder
from hf_nullspace.core.uploads import push_folder
from hf_nullspace.hub.metric import write_space

ROWS = np.random.default_rng(0).integers(0, 3, (2, 60))
CONDITIONS = np.repeat(["clean", "fog/1", "fog/2"], 20)


def scores(path, tmp_path, **more):
    module = evaluate.load(path, cache_dir=str(tmp_path / "cache"), experiment_id=str(len(list(tmp_path.iterdir()))))
    rows = {"predictions": ROWS[0], "references": ROWS[1], "condition": CONDITIONS}
    return module.compute(**rows, reference_errors={"fog": [40.0, 60.0], "clean": 10.0})


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [path for path in sys.path if (Path(path) / "evaluate_modules").is_dir()]  # of tests before
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in others])
    yield
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


def test_the_installed_folder_loads(tmp_path, own_modules):
    found = scores(metric_folder(), tmp_path)
    correct = (ROWS[0] == ROWS[1]).reshape(3, 20).mean(1)
    assert list(found["accuracies"].values()) == pytest.approx(correct)
    assert found["mce"] == pytest.approx(100 * (2 - correct[1] - correct[2]) / (0.4 + 0.6))


def test_a_pulled_space_gives_the_same_numbers_without_hf_nullspace(hub_here, tmp_path, own_modules, monkeypatch):
    installed = scores(metric_folder(), tmp_path)
    folder = tmp_path / "space"
    write_space(folder, "lab/robust_scores")
    push_folder(folder, "lab/robust_scores", repo_type="space", space_sdk="gradio")
    pulled = Path(snapshot_download("lab/robust_scores", repo_type="space", cache_dir=tmp_path / "fresh"))
    for name in [name for name in sys.modules if name.startswith(("hf_nullspace", "evaluate_modules"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hf_nullspace", None)  # an import of it raises from here on
    assert scores(str(pulled / "robust_scores.py"), tmp_path) == installed
    monkeypatch.setattr(
        evaluate.config, "HUB_EVALUATE_URL", f"{hub_here.endpoint}/spaces/{{path}}/resolve/{{revision}}/{{name}}"
    )
    assert scores("lab/robust_scores", tmp_path) == installed
    assert any("/spaces/lab/robust_scores/resolve/" in line and line.endswith("scores.py") for line in hub_here.asked)


def test_the_space_is_whole(tmp_path):
    paths = write_space(tmp_path / "space", "lab/robust_scores")
    texts = {path.name: path.read_text() for path in paths}
    assert set(texts) == {
        "README.md", "app.py", "requirements.txt", "tests.py", "robust_scores.py", "scores.py", "published.py"
    }  # fmt: skip
    front = yaml.safe_load(texts["README.md"].split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert {"evaluate", "metric"} <= set(front["tags"])
    assert 'evaluate.load("lab/robust_scores")' in texts["README.md"]
    assert "ORG/" not in texts["README.md"]
    assert '"robust_scores.py"' in texts["app.py"]
    assert "hf" not in texts["requirements.txt"], "not on an index that a Space installs from"
    package = Path(metric_folder()).parents[1] / "robustness"
    assert all(texts[f"{part}.py"] == (package / f"{part}.py").read_text() for part in ("scores", "published"))
    code = "".join(texts[f"{part}.py"] for part in ("robust_scores", "scores", "published"))
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    assert imported - sys.stdlib_module_names == set(re.findall(r"^[a-z]+", texts["requirements.txt"], re.MULTILINE))


@pytest.mark.parametrize("name", ["robustness", "lab/robust-scores", "lab/Robust", "lab/import", "a/b/c", "lab/2d"])
def test_a_name_that_evaluate_cannot_import_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"`evaluate` imports NAME\.py from ORG/NAME"):
        write_space(tmp_path, name)
