"""One folder, one run: what counts as the same run."""

import json

import pytest

from hf_nullspace.training.run_settings import SETTINGS_NAME, OtherRunError, claim_folder

TRAINING = {"epsilon": 0.03, "noise_learner": "descent", "noise_mix": "one", "output_dir": "here"}


def test_the_same_settings_go_on_and_others_are_refused(tmp_path):
    claim_folder(tmp_path, {"training": TRAINING})
    claim_folder(tmp_path, {"training": TRAINING | {"output_dir": "there"}})
    with pytest.raises(OtherRunError, match=r"epsilon: 0\.03 there, 0\.1 now"):
        claim_folder(tmp_path, {"training": TRAINING | {"epsilon": 0.1}})
    claim_folder(tmp_path, {"training": TRAINING | {"epsilon": 0.1}}, overwrite=True)
    assert json.loads((tmp_path / SETTINGS_NAME).read_text())["training"]["epsilon"] == 0.1


def test_a_run_from_before_a_setting_came_goes_on_as_it_was(tmp_path):
    older = {name: value for name, value in TRAINING.items() if not name.startswith("noise")}
    claim_folder(tmp_path, {"training": older})
    claim_folder(tmp_path, {"training": TRAINING})
    with pytest.raises(OtherRunError, match="noise_learner: descent there, boundary now"):
        claim_folder(tmp_path, {"training": TRAINING | {"noise_learner": "boundary"}})
    with pytest.raises(OtherRunError, match="decay: None there, 1 now"):
        claim_folder(tmp_path, {"training": TRAINING | {"decay": 1}})
