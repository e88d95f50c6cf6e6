"""One folder, one run: what counts as the same run."""

import json

import pytest

from hf_nullspace.core.files import DamagedFileError
from hf_nullspace.training.run_settings import SETTINGS_NAME, OtherRunError, check_folder, claim_folder

TRAINING = {"epsilon": 0.03, "noise_learner": "descent", "noise_mix": "one", "output_dir": "here"}


def test_the_same_settings_go_on_and_others_are_refused(tmp_path):
    claim_folder(tmp_path, {"training": TRAINING})
    (tmp_path / "control").mkdir()
    claim_folder(tmp_path, {"training": TRAINING | {"epsilon": 0.2}})  # nothing was done there yet
    claim_folder(tmp_path, {"training": TRAINING | {"output_dir": "there"}})
    (tmp_path / "noises").mkdir()
    (tmp_path / "noises" / "round-000.safetensors").write_bytes(b"")
    with pytest.raises(OtherRunError, match=r"epsilon: 0\.03 there, 0\.1 now"):
        claim_folder(tmp_path, {"training": TRAINING | {"epsilon": 0.1}})
    claim_folder(tmp_path, {"training": TRAINING | {"epsilon": 0.1}}, overwrite=True)
    assert json.loads((tmp_path / SETTINGS_NAME).read_text())["training"]["epsilon"] == 0.1


def test_other_contents_under_the_same_names_are_refused(tmp_path):
    settings = {"training": TRAINING}
    contents = {"base weights": "aa", "training images": "bb"}
    claim_folder(tmp_path, settings, contents)
    (tmp_path / "noises").mkdir()
    (tmp_path / "noises" / "round-000.safetensors").write_bytes(b"")
    claim_folder(tmp_path, settings, contents)
    with pytest.raises(OtherRunError, match=r"began with something else .*base weights: aa there, cc now"):
        claim_folder(tmp_path, settings, contents | {"base weights": "cc"})
    check_folder(tmp_path, settings)  # before anything is loaded, names are all that is known
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "mine.txt").write_text("")
    said = []
    claim_folder(tmp_path, settings, contents | {"base weights": "cc"}, overwrite=True, say=said.append)
    assert said == [f"Deleting the earlier run in {tmp_path}: checkpoint-2, noises, run.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "run.json"]
    claim_folder(tmp_path, settings, contents | {"base weights": "cc"})


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    """A checkpoint of a stranger would be gone on from, and reported as ours."""
    for name in ("checkpoint-12", ".lock"):
        (tmp_path / name).mkdir()
    for act in (check_folder, claim_folder):
        with pytest.raises(OtherRunError, match=r"is not empty \(checkpoint-12\) and holds no run"):
            act(tmp_path, {"training": TRAINING})
    with pytest.raises(OtherRunError, match="is not empty"):
        claim_folder(tmp_path, {"training": TRAINING}, overwrite=True)
    (tmp_path / "checkpoint-12").rmdir()
    claim_folder(tmp_path, {"training": TRAINING})


def test_a_damaged_record_of_the_settings_names_the_file(tmp_path):
    claim_folder(tmp_path, {"training": TRAINING})
    (tmp_path / "noises").mkdir()
    (tmp_path / "noises" / "round-000.safetensors").write_bytes(b"")
    (tmp_path / SETTINGS_NAME).write_text('{"training": {')
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged: expected JSON .*--overwrite true"):
        claim_folder(tmp_path, {"training": TRAINING})
    claim_folder(tmp_path, {"training": TRAINING}, overwrite=True)
    claim_folder(tmp_path, {"training": TRAINING})
