"""One model, images to learn noises on, images to measure them on, and the points that are finished."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from figures.setting import Setting
from hf_nullspace.core.processes import over_processes
from hf_nullspace.core.seeds import derive_seed
from hf_nullspace.data.image_set import collate
from hf_nullspace.models.patch_embedding import embeddings_inside
from hf_nullspace.noise.algorithm1 import NoiseSettings, learn_noise
from hf_nullspace.noise.artifact import NullspaceNoise, model_hash, provenance_of
from hf_nullspace.noise.history import NoiseHistory
from hf_nullspace.noise.influence import centred_norm, match_rate, noise_influence
from hf_nullspace.noise.probe import Probe
from hf_nullspace.training.noise_stream import noise_stream, own_randomness

T = TypeVar("T")
COST_OF_A_STEP = 4.0  # forward passes: clean, noisy, and a backward that counts as two


class Experiment:
    """What the figures share. Noises are learned in the precision of the settings and measured in float32.

    ``steps_taken`` are those of noises that were learned before, for the time left.
    """

    def __init__(self, setting: Setting, model: nn.Module, steps_taken: list[int] | None = None) -> None:
        self.setting, self.model, self.steps_taken = setting, model, [] if steps_taken is None else steps_taken
        self.config, self.batches, self.bar = setting.config, setting.batches, setting.bar
        self.train_set = setting.images(self.config.seed)
        self.model_sha256 = model_hash(model)
        measured_on = [float(batch.double().sum()) for batch in self.batches]
        self._data = {"data": asdict(setting.data_args), "measured on": measured_on, "model": self.model_sha256}
        self.images = sum(map(len, self.batches))
        """How many images this process measures on."""
        share = (self.config.noise_batch_size or 0) / self.config.world_size
        self.cost_of_a_step = share * COST_OF_A_STEP

    def kept(self, make: Callable[[], Any], **depends_on: Any) -> Any:
        """``Records.kept`` for this model and its data."""
        return self.setting.records.kept(make, **self._data, **depends_on)

    def each(self, items: Sequence[T], cost: Callable[[], float]) -> Iterator[T]:
        """The items one after the other; those to come count for ``cost()`` forward passes each (the time left)."""
        to_come = object()
        for left, item in zip(reversed(range(len(items))), items, strict=True):
            self.bar.expect(to_come, left * cost())
            yield item

    def counter(self, title: str, evaluations: int) -> Callable[[int, int], None]:
        """Counts that many evaluations over all images on the bar; for ``on_step`` of ``noise.closure``."""
        self.bar.begin(title)
        self.bar.expect(object(), evaluations * self.images)
        return lambda done, of: self.bar.advance(self.images)

    def cost(self, settings: NoiseSettings) -> float:
        """Forward passes of this process for one noise: T steps, or what noises took that reached epsilon so far."""
        known = settings.epsilon is not None and self.steps_taken
        steps = sum(self.steps_taken) / len(self.steps_taken) if known else settings.max_steps
        return steps * self.cost_of_a_step

    def learn(self, settings: NoiseSettings, index: int, title: str) -> tuple[NullspaceNoise, NoiseHistory]:
        """A noise from the start and the batches that (``config.seed``, ``index``) gives."""
        config, key, seed = self.config, object(), derive_seed(self.config.seed, index)
        self.bar.begin(title)
        self.bar.expect(key, self.cost(settings))
        with own_randomness(seed), torch.autocast(config.device.type, torch.bfloat16, enabled=config.bf16):
            held_out, batches = noise_stream(
                self.train_set,
                collate,
                batch_size=config.noise_batch_size,
                held_out_images=config.held_out_images,
                seed=config.seed,
                round=index,
                rank=config.process_index,
                processes=config.world_size,
                num_workers=config.dataloader_num_workers,
            )
            known = replace(provenance_of(self.model, hashed=False), model_sha256=self.model_sha256, round=index)
            noise, history = learn_noise(
                self.model,
                batches,
                settings,
                seed=seed,
                held_out=held_out,
                provenance=known,
                on_step=lambda step, influence: self.bar.advance(self.cost_of_a_step if step else 0),
            )
        self.bar.expect(key, self.cost_of_a_step * history.steps)
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
    noise = noise.to(probe.device)
    sums = torch.zeros(2, dtype=torch.float64, device=probe.device)
    for (chunk, count), clean in zip(probe.held_out, probe.clean, strict=True):
        noisy = probe.logits(probe.prepare(chunk), noise)
        sums += count * torch.stack([noise_influence(clean, noisy).double(), match_rate(clean, noisy)])
    influence, match = (over_processes(sums) / probe.held_out_images).tolist()
    return {"influence": influence, "match": match}


@torch.no_grad()
def embedding_norm(probe: Probe) -> float:
    """Mean over the images of the centred norm of their own patch embeddings: the scale of a noise's norm."""
    sums = torch.zeros(2, dtype=torch.float64)
    for chunk, _ in probe.held_out:
        with embeddings_inside(probe.hook.module) as seen:
            probe.logits(probe.prepare(chunk))
        (embeddings,) = seen
        tokens = embeddings.flatten(2).transpose(1, 2) if embeddings.dim() == 4 else embeddings
        sums += torch.tensor([sum(float(centred_norm(i)) for i in tokens), len(tokens)], dtype=sums.dtype)
    total, count = over_processes(sums.to(probe.device)).tolist()
    return total / count
