"""For all tests: one thread each, or OMP_NUM_THREADS. One is faster for tiny models and for two test processes."""

import gc
import os

import pytest
import torch

from loopback_hub import TOKEN, LoopbackHub

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """What was imported is not searched for garbage: accelerate collects after every training; that took half of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub_here(tmp_path, monkeypatch):
    """An empty :class:`LoopbackHub`; the clients of this process speak to it, with a fresh cache and a good token.

    They read their settings from the environment when they are imported: these are the same, set afterwards.
    """
    import datasets.config
    import transformers.utils.hub
    from huggingface_hub import HfFileSystem, constants, hf_api

    with LoopbackHub(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "cache", TOKEN).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
        HfFileSystem.clear_instance_cache()
        yield hub
