"""A bank: several noises of one model, in order, as one folder or one repository."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

from huggingface_hub import CommitInfo

from hf_nullspace.core.files import write_json
from hf_nullspace.core.uploads import push_folder, whole_name
from hf_nullspace.noise.artifact import NullspaceNoise, check_own_folder, downloaded, load_noise_bank, save_noise_bank
from hf_nullspace.noise.card import write_bank_card

FOLDER = "noises"
_FORMAT = "hf-nullspace noise bank v1"
_FILES = "round-*.safetensors"


@dataclass(frozen=True, eq=False)
class NoiseBank(Sequence[NullspaceNoise]):
    """Noises in order, for example of all rounds of a run: ``bank[k]``, ``len(bank)``, ``for noise in bank``.

    Raises:
        ValueError: if there is none, or their shapes differ.
    """

    noises: tuple[NullspaceNoise, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "noises", tuple(self.noises))
        shapes = {(tuple(noise.tensor.shape), noise.grid) for noise in self.noises}
        if len(shapes) != 1:
            raise ValueError(f"a bank holds noises of one shape, got {sorted(shapes) or 'no noise'}")

    def __len__(self) -> int:
        return len(self.noises)

    @overload
    def __getitem__(self, index: int) -> NullspaceNoise: ...
    @overload
    def __getitem__(self, index: slice) -> "NoiseBank": ...
    def __getitem__(self, index: int | slice) -> "NullspaceNoise | NoiseBank":
        return NoiseBank(self.noises[index]) if isinstance(index, slice) else self.noises[index]

    def configs(self) -> list[dict[str, Any]]:
        """Everything but the tensors, noise by noise."""
        return [noise.config() for noise in self.noises]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Load from a folder or a Hub repository: a bank's own, or a model's that was fine-tuned with these noises.

        Raises:
            FileNotFoundError: if there is no bank, a noise of it is missing, or the Hub cannot be asked and the cache
                does not have it.
            ValueError: if a file is no noise, or the noises do not belong together.
        """
        path = Path(name_or_path)
        if not path.is_dir():
            path = downloaded(name_or_path, [_FILES, f"{FOLDER}/{_FILES}", "config.json"], revision, token)
        bank = cls(tuple(load_noise_bank(path / FOLDER if (path / FOLDER).is_dir() else path)))
        config = json.loads((path / "config.json").read_text("utf-8")) if (path / "config.json").is_file() else {}
        if config.get("format") == _FORMAT and config.get("count") != len(bank):
            raise FileNotFoundError(
                f"{name_or_path} has {len(bank)} noises, its config.json says {config.get('count')}: bring back the "
                f"missing ones in {FOLDER}/ (the run has them), or save what there is as a bank of its own"
            )
        return bank

    def save_pretrained(self, folder: Path | str, *, repo_id: str | None = None) -> Path:
        """Write ``noises/round-000.safetensors`` ..., ``config.json``, and a card with a table of all.

        Raises:
            ValueError: if the folder has a ``config.json`` of something else.
        """
        folder = Path(folder)
        check_own_folder(folder, _FORMAT)
        written = save_noise_bank(self.noises, folder / FOLDER)
        for older in set((folder / FOLDER).glob(_FILES)) - set(written):
            older.unlink()
        write_bank_card(self.configs(), folder, repo_id)
        write_json(folder / "config.json", {"format": _FORMAT, "count": len(self), "noises": self.configs()})
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload nullspace noises",
        token: str | None = None,
    ) -> CommitInfo:
        """Upload what :meth:`save_pretrained` writes as one commit; call it again to repeat it.

        Noises of an earlier, longer bank in the repository are deleted by the same commit.

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
            NoiseBank(tuple(noise.without_local_path() for noise in self.noises)).save_pretrained(
                folder, repo_id=repo_id
            )
            again = f"The noises are as they were; repeat the upload with bank.push_to_hub({repo_id!r})"
            return push_folder(folder, repo_id, replace=[f"{FOLDER}/{_FILES}"], afterwards=again, **named)
