"""Run by every process of a launch: ``python run_push.py FOLDER`` trains four steps and pushes each, then the end."""

import sys
from pathlib import Path

from hf_nullspace import NullspaceTrainer
from hf_nullspace.models.preprocessing import make_image_processor
from tiny_models import tiny_model
from tiny_training import Images, config


def main(folder: Path) -> None:
    hub = {"push_to_hub": True, "hub_model_id": "someone/robust", "hub_strategy": "checkpoint"}
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    args = config(folder, per_device_train_batch_size=4, **hub, **saving)
    processor = make_image_processor(16)
    trainer = NullspaceTrainer(tiny_model(), args, train_dataset=Images(), processing_class=processor)
    trainer.train()
    pushed = trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    print(f"rank {args.process_index} of {args.world_size} pushed: {pushed is not None}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
