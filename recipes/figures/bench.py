"""A model, images to learn noises on, images to measure them on, and the points that are finished."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_nullspace.core.processes import over_processes
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.models.patch_embedding import PatchEmbeddingNoise
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.artifact import NullspaceNoise, model_hash, provenance_of
from hf_nullspace.noise.history import NoiseHistory
from hf_nullspace.noise.influence import centred_norm, match_rate, noise_influence
from hf_nullspace.noise.probe import Probe, probing
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.robustness.records import Records
from hf_nullspace.training.config import NullspaceConfig
from hf_nullspace.training.data import collate
from hf_nullspace.training.noise_stream import noise_stream, own_randomness

T = TypeVar("T")
COST_OF_A_STEP = 4.0  # forward passes: clean, noisy, and a backward that counts as two


@dataclass
class Bench:
    """What the figures share. Noises are learned in the precision of ``config`` and measured in float32."""

    model: nn.Module
    train_set: Any
    """What noises are learned on: the training images, augmented as they are for fine-tuning."""
    batches: list[Tensor]
    """Images to measure on, ``pixel_values`` (b, C, H, W): this process's share."""
    config: NullspaceConfig
    records: Records
    bar: Progress
    identity: dict[str, Any]
    """What a finished point depends on besides the model and its own settings: the data, the images."""
    steps_taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hook = PatchEmbeddingNoise(self.model)
        self.model_sha256 = model_hash(self.model)

    def close(self) -> None:
        """Take the hook off the model."""
        self.hook.remove()

    @contextmanager
    def probe(self) -> Iterator[Probe]:
        """The frozen model with its clean answers to the images."""
        with probing(self.model, self.batches, hook=self.hook) as probe:
            yield probe

    def kept(self, make: Callable[[], Any], **depends_on: Any) -> Any:
        """What ``make()`` returned in this or an earlier run, as JSON gives it back, for the same model and data."""
        key = self.records.key(**self.identity, model=self.model_sha256, **depends_on)
        found = self.records.read(key)
        if found is None:
            self.records.write(key, make())
            found = self.records.read(key)
        return found

    def each(self, items: Sequence[T], cost: Callable[[], float]) -> Iterator[T]:
        """The items one after the other; those to come count for ``cost()`` forward passes each (the time left)."""
        keys = [object() for _ in items]
        for place, item in enumerate(items):
            self.bar.expect(keys[place], 0)
            for key in keys[place + 1 :]:
                self.bar.expect(key, cost())
            yield item

    def counter(self, evaluations: int) -> Callable[[int, int], None]:
        """Counts that many evaluations over all images on the bar; for ``on_step`` of ``noise.closure``."""
        self.bar.expect(object(), evaluations * self.images)
        return lambda done, of: self.bar.advance(self.images)

    @property
    def images(self) -> int:
        """How many images this process measures on."""
        return sum(map(len, self.batches))

    def cost(self, settings: NoiseSettings) -> float:
        """Forward passes of this process for one noise: T steps, or what noises took that reached epsilon so far."""
        known = settings.epsilon is not None and self.steps_taken
        steps = sum(self.steps_taken) / len(self.steps_taken) if known else settings.max_steps
        return steps * self.share_of_a_step

    @property
    def share_of_a_step(self) -> float:
        """Forward passes of this process for one step of a noise."""
        return (self.config.noise_batch_size or 0) / self.config.world_size * COST_OF_A_STEP

    def learn(self, settings: NoiseSettings, index: int, title: str) -> tuple[NullspaceNoise, NoiseHistory]:
        """A noise from the start and the batches that (``config.seed``, ``index``) gives."""
        config = self.config
        share, known = self.share_of_a_step, provenance_of(self.model, hashed=False)
        key, seed = object(), derive_seed(config.seed, index)
        self.bar.begin(title)
        self.bar.expect(key, self.cost(settings))
        done = [0]

        def show(step: int, influence: float) -> None:
            self.bar.advance(share * (step - done[0]))
            done[0] = step

        autocast = torch.autocast(config.device.type, torch.bfloat16, enabled=config.bf16)
        with own_randomness(seed), autocast:
            held_out, batches = noise_stream(
                self.train_set,
                collate,
                batch_size=config.noise_batch_size,  # type: ignore[arg-type]
                held_out_images=config.held_out_images,
                seed=config.seed,
                round=index,
                rank=config.process_index,
                processes=config.world_size,
                num_workers=config.dataloader_num_workers,
            )
            noise, history = learn_noise(
                self.model,
                batches,
                settings,
                seed=seed,
                held_out=held_out,
                hook=self.hook,
                provenance=replace(known, model_sha256=self.model_sha256, round=index),
                on_step=show,
            )
        self.bar.expect(key, share * history.steps)
        self.steps_taken.append(history.steps)
        return noise, history

    def learning(self, settings: NoiseSettings) -> dict[str, Any]:
        """What a learned noise depends on besides its index."""
        c = self.config
        return asdict(settings) | {"seed": c.seed, "batch": c.noise_batch_size, "bf16": c.bf16,
                                   "held out": c.held_out_images}  # fmt: skip


@torch.no_grad()
def influence_and_match(probe: Probe, noise: Tensor) -> dict[str, float]:
    """Influence, in [0, 2], and share of equal predictions, in [0, 1], of ``noise`` (1, N, D) on all the images."""
    sums = torch.zeros(2, dtype=torch.float64, device=probe.device)
    for (chunk, count), clean in zip(probe.held_out, probe.clean, strict=True):
        noisy = probe.logits(probe.prepare(chunk), noise)
        sums += count * torch.stack([noise_influence(clean, noisy).double(), match_rate(clean, noisy)])
    influence, match = (over_processes(sums) / probe.held_out_images).tolist()
    return {"influence": influence, "match": match}


@torch.no_grad()
def embedding_norm(bench: Bench) -> float:
    """Mean over the images of the centred norm of their own patch embeddings: the scale of a noise's norm."""
    sums = torch.zeros(2, dtype=torch.float64)

    def add(module: nn.Module, args: Any, output: Any) -> None:
        embeddings = output[0] if isinstance(output, tuple) else output
        tokens = embeddings.flatten(2).transpose(1, 2) if embeddings.dim() == 4 else embeddings
        sums.add_(torch.tensor([sum(float(centred_norm(i)) for i in tokens), len(tokens)], dtype=sums.dtype))

    handle = bench.hook.module.register_forward_hook(add)
    try:
        with bench.probe():  # asks for the clean logits of all images once
            pass
    finally:
        handle.remove()
    total, count = over_processes(sums.to(next(bench.model.parameters()).device)).tolist()
    return total / count
