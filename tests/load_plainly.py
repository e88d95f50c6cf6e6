"""What plain transformers makes of model folders: python load_plainly.py IMAGE RESULT.json FOLDER [FOLDER ...]

Imports nothing of this repository, so that any interpreter with transformers can run it.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

sys.modules["hf_nullspace"] = None  # an import of it fails from here on, as where it is not installed


def answers(folder, image):
    """Logits and class by the model and its image processor, and the class by a pipeline."""
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**processor(image, return_tensors="pt")).logits[0]
    best = pipeline("image-classification", model=folder)(image, top_k=1)[0]
    return {
        "logits": logits.tolist(),
        "label": model.config.id2label[int(logits.argmax())],
        "pipeline": best["label"],
        "score": best["score"],
        "not_as_saved": sorted(map(str, [key for keys in info.values() for key in keys])),
        "class": type(model).__name__,
    }


def main():
    picture, result, *folders = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with Image.open(picture) as file:
        image = file.convert("RGB")
    found = {folder: answers(folder, image) for folder in folders}
    loaded = sorted(name for name, module in sys.modules.items() if name.startswith("hf_nullspace") and module)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    with open(result, "w", encoding="utf-8") as file:
        json.dump({"versions": versions, "ours": loaded, "folders": found}, file)


if __name__ == "__main__":
    main()
