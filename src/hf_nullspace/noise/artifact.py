"""Learned noises as files and repositories: the tensor, and where it came from; several of one model are a bank."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_nullspace.core.files import DamagedFileError, read_json, write_json, write_whole
from hf_nullspace.core.uploads import push_folder, whole_name
from hf_nullspace.noise.card import write_noise_card
from hf_nullspace.noise.influence import centred_norm
from hf_nullspace.noise.provenance import NoiseProvenance, warn_of_other_weights
from hf_nullspace.noise.provenance import hub_commit as hub_commit
from hf_nullspace.noise.provenance import model_hash as model_hash
from hf_nullspace.noise.provenance import provenance_of as provenance_of

WEIGHTS_NAME = "nullspace_noise.safetensors"
CONFIG_NAME = "nullspace_noise.json"
"""Beside a model, which has its own ``config.json``."""
_FORMAT = "hf-nullspace noise v1"


@dataclass(frozen=True, eq=False)
class NullspaceNoise:
    """Additive noise v (1, N, D) on the patch embeddings of one model, with the grid (h, w) of its N = h * w patches.

    Raises:
        ValueError: if the shapes disagree or the tensor is not finite.
    """

    tensor: Tensor
    grid: tuple[int, int]
    provenance: NoiseProvenance = field(default_factory=NoiseProvenance)

    def __post_init__(self) -> None:
        if self.tensor.dim() != 3 or self.tensor.shape[0] != 1:
            raise ValueError(f"a noise has the shape (1, patches, features), got {tuple(self.tensor.shape)}")
        if min(self.grid) < 1 or self.grid[0] * self.grid[1] != self.tensor.shape[1]:
            raise ValueError(f"a grid of {self.grid[0]} x {self.grid[1]} patches, but {self.tensor.shape[1]} rows")
        if not self.tensor.is_floating_point():
            raise ValueError(f"a noise is a floating-point tensor, got {self.tensor.dtype}")
        if not self.tensor.isfinite().all():
            raise ValueError("the noise has NaN or infinite entries")

    @property
    def norm(self) -> float:
        """Euclidean norm, as the paper reports it."""
        return float(torch.linalg.vector_norm(self.tensor))

    @property
    def centred_norm(self) -> float:
        """Norm without each token's feature mean, the part that counts (docs/deviations.md)."""
        return float(centred_norm(self.tensor))

    def check_weights(self, model: nn.Module) -> None:
        """Warn if the weights of ``model`` are not those that the noise was learned on, by their SHA-256.

        There is no warning where the weights were not recorded, or are spread over processes (FSDP2). A model is hashed
        once, and again when its weights have changed.
        """
        warn_of_other_weights(self.provenance, model)

    def interpolate(self, grid: tuple[int, int]) -> Self:
        """The noise for another image size of the same model: bicubic over the grid, like a position embedding.

        Its influence is not known there, so the provenance forgets it.
        """
        if min(grid) < 1:
            raise ValueError(f"grid={grid}: expected at least 1 x 1 patches")
        maps = self.tensor.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
        tensor = resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
        provenance = dataclasses.replace(self.provenance, influence=None, influence_images=None)
        return dataclasses.replace(self, tensor=tensor, grid=grid, provenance=provenance)

    def config(self) -> dict[str, Any]:
        """Everything but the tensor, as it is written beside it."""
        return {
            "format": _FORMAT,
            "shape": list(self.tensor.shape),
            "grid": list(self.grid),
            "norm": self.norm,
            "centred_norm": self.centred_norm,
            "provenance": dataclasses.asdict(self.provenance),
        }

    def save(self, path: Path | str) -> Path:
        """Write one self-describing safetensors file: the tensor, and :meth:`config` in its header."""
        tensors = {"noise": self.tensor.detach().cpu().contiguous()}
        # one entry only: safetensors writes several in a random order, and equal noises should be equal files
        metadata = {"hf_nullspace": json.dumps(self.config(), allow_nan=False)}
        return write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no noise, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no noise at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("hf_nullspace")
                if header is None or "noise" not in file.keys():  # noqa: SIM118 (a file has no __contains__)
                    raise ValueError(f"{path} is no noise: expected a tensor 'noise' and a header 'hf_nullspace'")
                tensor = file.get_tensor("noise")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}); download or learn it again"
            ) from None
        try:
            return cls(tensor, *_read_header(header, tensor))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no noise, or a damaged one: {error}; download or learn it again") from None

    def save_beside_model(self, folder: Path | str) -> Path:
        """Write ``nullspace_noise.safetensors`` and, for people, ``nullspace_noise.json`` into a model's folder."""
        folder = Path(folder)
        write_json(folder / CONFIG_NAME, self.config())
        return self.save(folder / WEIGHTS_NAME)

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        model: nn.Module | None = None,
        image_processor: Any = None,
        repo_id: str | None = None,
    ) -> Path:
        """Write a folder of the noise's own: ``nullspace_noise.safetensors``, ``config.json``, and a card.

        Args:
            model: what the noise was learned on, for the picture of its preimage in the card.
            image_processor: the model's, to draw that in pixels of [0, 1].
            repo_id: where the folder will live, for the card.

        Raises:
            ValueError: if the folder holds a model (:meth:`save_beside_model` is for that), or the noise is not
                ``model``'s.
        """
        folder = Path(folder)
        check_own_folder(folder)
        if model is not None:
            self.check_weights(model)
        write_noise_card(self.config(), self.tensor, folder, repo_id, model, image_processor)
        write_json(folder / "config.json", self.config())
        return self.save(folder / WEIGHTS_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model: nn.Module | None = None,
        image_processor: Any = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload nullspace noise",
        token: str | None = None,
    ) -> CommitInfo:
        """Upload what :meth:`save_pretrained` writes as one commit; call it again to repeat it.

        Raises:
            UploadError: if the Hub does not take it, with what to do.
        """
        repo_id = whole_name(repo_id, token)
        named: dict[str, Any] = {
            "private": private,
            "revision": revision,
            "commit_message": commit_message,
            "token": token,
        }
        with tempfile.TemporaryDirectory() as folder:
            shown = {"model": model, "image_processor": image_processor, "repo_id": repo_id}
            self.without_local_path().save_pretrained(folder, **shown)
            again = f"The noise is as it was; repeat the upload with noise.push_to_hub({repo_id!r})"
            return push_folder(folder, repo_id, afterwards=again, **named)

    def without_local_path(self) -> Self:
        """The noise as it is published: of a base model that is a folder here, only the folder's name."""
        base = self.provenance.base_model
        if base is None or self.provenance.revision is not None:
            return self
        return dataclasses.replace(self, provenance=dataclasses.replace(self.provenance, base_model=Path(base).name))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Load from a folder, a file, or a Hub repository (a noise's own, or a model's with the noise beside it).

        Raises:
            FileNotFoundError: if the folder or repository holds no noise.
            ValueError: if what it holds is no noise.
        """
        path = Path(name_or_path)
        if path.is_file():
            return cls.load(path)
        if not path.is_dir():
            path = downloaded(name_or_path, [WEIGHTS_NAME], revision, token)
        return cls.load(path / WEIGHTS_NAME)


def _read_header(header: str, tensor: Tensor) -> tuple[tuple[int, int], NoiseProvenance]:
    """Grid and provenance from what :meth:`NullspaceNoise.config` wrote. Raises ValueError if it is anything else."""
    config = json.loads(header)
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(f"its header has the format {found!r:.80}, expected {_FORMAT!r}")
    if config.get("shape") != list(tensor.shape):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, but its header says {config.get('shape')!r:.80}")
    match config.get("grid"):
        case [int(rows), int(columns)]:
            return (rows, columns), NoiseProvenance.from_json(config.get("provenance"))
    raise ValueError(f"its header has the grid {config.get('grid')!r:.80}, expected two numbers")


def downloaded(name: str | os.PathLike[str], files: list[str], revision: str | None, token: str | None) -> Path:
    """The folder in the cache with these files of a Hub repository. Raises FileNotFoundError if there are none."""
    try:
        folder = Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"no noise at {str(name)!r}: neither a folder or file here nor a repository on the Hub ({reason})"
        ) from error
    return folder


def check_own_folder(folder: Path, format: str = _FORMAT) -> None:
    """Raise ValueError if the ``config.json`` in ``folder`` is something else's than a noise's or a bank's."""
    path = folder / "config.json"
    try:
        found = read_json(path) if path.is_file() else {"format": format}
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; delete it, or choose another folder for the noise") from error
    if not isinstance(found, dict) or found.get("format") != format:
        raise ValueError(
            f"{folder} has a config.json that is not of {format!r}, perhaps a model's: choose another folder, a folder "
            "of its own; noise.save_beside_model(folder) writes a noise beside its model"
        )


def save_noise_bank(noises: Sequence[NullspaceNoise], folder: Path | str) -> list[Path]:
    """Write several noises as ``round-000.safetensors``, ``round-001.safetensors``, ... into ``folder``."""
    return [noise.save(Path(folder) / bank_file_name(index)) for index, noise in enumerate(noises)]


def bank_file_name(index: int) -> str:
    """File name of the noise of one round in a bank."""
    return f"round-{index:03d}.safetensors"


def load_noise_bank(folder: Path | str) -> list[NullspaceNoise]:
    """All noises of a folder that :func:`save_noise_bank` or a training run wrote, in the order of their rounds.

    Raises:
        FileNotFoundError: if there is none, or one between the first and the last is missing.
        ValueError: if a file is no noise.
    """
    paths = sorted(Path(folder).glob("round-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no noises (round-*.safetensors) in {folder}")
    missing = [name for name in map(bank_file_name, range(len(paths))) if not (Path(folder) / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has {len(paths)} noises up to {paths[-1].name}, and no {missing[0]}: bring it back (the run or "
            "the repository has it), or load single noises with NullspaceNoise.load"
        )
    return [NullspaceNoise.load(path) for path in paths]
