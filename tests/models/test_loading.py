"""A checkpoint loads with its own weights, or one line says why not; nothing in it is run."""

import io
import logging

import pytest
import torch
import transformers

from bad_models import DAMAGES, Hostile, save_bad_models, save_good
from hf_nullspace.models.loading import (
    ModelNotLoadedError,
    NoHeadError,
    load_image_processor,
    load_model,
    load_model_config,
)
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return save_bad_models(tmp_path_factory.mktemp("bad"))


def test_a_good_one_has_the_weights_of_its_file(tmp_path):
    folder = save_good(tmp_path)
    loaded, saved = load_model(str(folder)).state_dict(), tiny_model().state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert load_model_config(str(folder)).model_type == "vit"
    assert type(load_image_processor(str(folder))).__name__.endswith("Pil")


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in DAMAGES.items() if words])
def test_a_bad_one_is_one_line_with_its_name(name, words, bad):
    folder = str(bad / name)
    load = load_image_processor if name.endswith("processor") else load_model
    with pytest.raises(ModelNotLoadedError) as raised:
        load(folder)
    message = str(raised.value)
    assert message.startswith(f"cannot load the model {folder!r}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400 + len(folder)


def test_plain_tensors_in_a_bin_load_and_other_pickles_do_not_run(bad, tmp_path):
    assert load_model(str(bad / "plain_bin")).num_labels == 5
    with pytest.raises(ModelNotLoadedError):
        load_model(str(bad / "pickled"))
    assert not (bad / "pickled" / "ran").exists()
    call, arguments = Hostile(tmp_path / "ran").__reduce__()
    call(*arguments)
    assert (tmp_path / "ran").exists(), "it would have"


def test_transformers_own_report_is_not_logged(bad):
    """Its table of missing weights would stand above the one line; its verbosity is as it was afterwards."""
    verbosity = transformers.logging.get_verbosity()
    logged = logging.StreamHandler(io.StringIO())
    transformers.logging.add_handler(logged)
    try:
        with pytest.raises(ModelNotLoadedError):
            load_model(str(bad / "lost_tensor"))
    finally:
        transformers.logging.remove_handler(logged)
    assert logged.stream.getvalue() == ""
    assert transformers.logging.get_verbosity() == verbosity


def test_a_missing_head_is_only_for_those_who_make_a_new_one(bad):
    folder = str(bad / "no_head")
    with pytest.raises(NoHeadError):
        load_model(folder)
    assert load_model(folder, new_head=True).num_labels == load_model(folder, headless=True).num_labels == 5
    with pytest.raises(ModelNotLoadedError, match="weights are missing"):
        load_model(str(bad / "lost_tensor"), new_head=True)
