"""torchvision for the tests, also beside the CPU build of torch, for which it has no wheel of its own.

``python tests/torchvision_here.py recipes/finetune.py --augmentation augmix ...`` runs a recipe with it.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("VISION_FOLDER", Path(sys.prefix) / "vision"))
"""Where it may lie: ``.venv/bin/python -m pip install --no-deps --target .venv/vision torchvision==0.28.0``."""
INSTALLED = importlib.util.find_spec("torchvision") is not None
HERE = INSTALLED or FOLDER.is_dir()
SCHEMAS = (  # as in torchvision/_meta_registrations.py of 0.28
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
)
_kept = []


def why_missing():
    """Make ``torchvision.transforms.v2`` importable in this process; None, or why it cannot be.

    A wheel that was built for CUDA registers no operator beside the CPU build, and then does not import: four of them
    are declared here, without a kernel. No transform calls them.
    """
    if not HERE:
        return f"torchvision is not installed, and {FOLDER.name}/ of the environment holds none"
    if not INSTALLED and str(FOLDER) not in sys.path:
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # remembers that there is none: its image processors stay as in the other tests
        sys.path.append(str(FOLDER))
    try:
        from torchvision.transforms import v2
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _kept.append(torch.library.Library("torchvision", "DEF"))
        for schema in SCHEMAS:
            _kept[0].define(schema)
        from torchvision.transforms import v2  # noqa: F401
    return None


if __name__ == "__main__":
    if why := why_missing():
        raise SystemExit(why)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
