"""What this package overrides or calls of transformers' Trainer beside its documented interface: all of it, and why.

A method that is renamed upstream would leave an override that nothing calls, without an error. So the list is checked
when the trainer is imported, and ``tests/training/test_private_methods.py`` finds no other private name in use.
"""

import inspect

import transformers
from transformers import Trainer

TESTED = "5.23.0"  # constraints.txt has it, too

PRIVATE: dict[str, tuple[str, ...]] = {
    # The folder of a trial in a hyperparameter search; no public name has it.
    "_get_output_dir": ("trial",),
    # Weights of a checkpoint: loaded without losing any (transformers #48805), the average where it was the best.
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    # A full disk is one clear error; the push and the deletion of older checkpoints come when all of it is written.
    "_save_checkpoint": ("model", "trial"),
    # Public, with a private parameter: whether the user called it, which is when a push follows.
    "save_model": ("output_dir", "_internal_call"),
    # Public, but documented nowhere: called once when a training loop begins, before the optimizer is made.
    "set_initial_training_values": ("args", "dataloader"),
    "get_total_train_batch_size": ("args",),
}
"""Name -> the parameters after ``self`` that are passed, in their order."""


def check_private_methods(kind: type = Trainer) -> None:
    """Look whether ``kind``, the installed Trainer, has every method of :data:`PRIVATE` and takes its parameters.

    Raises:
        ImportError: in one line that names the version and what is missing.
    """
    wrong = []
    for name, parameters in PRIVATE.items():
        method = getattr(kind, name, None)
        if method is None:
            wrong.append(f"no {name}")
            continue
        signature = inspect.signature(method)
        try:
            signature.bind("self", *parameters)
        except TypeError:
            wrong.append(f"{name}{signature}, expected ({', '.join(('self', *parameters))})")
    if wrong:
        raise ImportError(
            f"transformers {transformers.__version__} does not fit hf-nullspace: its Trainer has {'; '.join(wrong)}. "
            f"Install a version that does: pip install transformers=={TESTED}"
        )
