"""Table 4: the dimension of the patch embedding's nullspace, of models or of configurations with random weights."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from figures.setting import Setting
from hf_nullspace.command_line import UsageError
from hf_nullspace.core.canvas import canvas, save_png
from hf_nullspace.linear.patch import PatchNullspace
from hf_nullspace.models.loading import load_model

# Table 4 of the paper, quoted: (features D, patch size) and the dimension of the nullspace.
TABLE_4 = {(192, 16): 576, (384, 32): 2688, (384, 16): 384, (768, 32): 2304, (768, 16): 2, (768, 8): 0,
           (1024, 32): 2048, (1024, 16): 0}  # fmt: skip
RANDOM = "random weights"
HEADER = "features  patch  dimension  paper  at tol/10  at 10 tol   s_min/s_max  model"


def make(setting: Setting) -> None:
    """The dimension of the nullspace of models and configurations."""
    own = setting.model_args.model_name_or_path
    names = [*setting.args.table4, *([own] if own else [])]
    rows = table_4(names, load_model, setting.say, seed=setting.config.seed)
    setting.say(f"'paper' is quoted; {remark(rows) or 'all as in the paper'}")
    quoted = {f"{features}:{patch}": dimension for (features, patch), dimension in TABLE_4.items()}
    setting.keep("table4", {"rows": rows}, quoted, partial(plot_table_4, rows))


def table_4(
    names: Sequence[str],
    load: Callable[[str], nn.Module],
    say: Callable[[str], None],
    *,
    stored_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows, printed one by one: ``PatchNullspace.summary``, the model's name, the paper's dimension or None.

    A name is a model, for ``load``; a configuration ``D:patch`` of 3 channels, with weights drawn from
    ``seed``; or "paper", the eight configurations of the paper.

    Raises:
        UsageError: for a configuration with a zero.
    """
    rows = []
    say(HEADER)
    papers = [f"{features}:{patch}" for features, patch in TABLE_4]
    for name in [one for given in names for one in (papers if given == "paper" else [given])]:
        features, _, patch = name.partition(":")
        if features.isdecimal() and patch.isdecimal():
            if not int(features) or not int(patch):
                raise UsageError(f"table4: {name!r}; expected at least 1 feature and patches of at least 1 pixel")
            generator = torch.Generator().manual_seed(seed)
            weight = torch.randn(int(features), 3, int(patch), int(patch), generator=generator)
            nullspace, kind = PatchNullspace.from_weight(weight, stored_dtype=stored_dtype), RANDOM
        else:
            nullspace, kind = PatchNullspace.from_model(load(name), stored_dtype=stored_dtype), name
        row = {"model": kind, "paper": None, **nullspace.summary()}
        if row["patch"][0] == 3 and row["patch"][1] == row["patch"][2]:
            row["paper"] = TABLE_4.get((row["features"], row["patch"][1]))
        rows.append(row)
        say(line_of(row))
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row below ``HEADER``; "paper" is quoted."""
    ratio = row["singular_values"][-1] / row["singular_values"][0]
    paper = "-" if row["paper"] is None else row["paper"]
    return (
        f"{row['features']:8d}  {row['patch'][1]:5d}  {row['dimension']:9d}  {paper:>5}  "
        f"{row['dimension_at_a_tenth']:9d}  {row['dimension_at_ten_times']:9d}  {ratio:12.2e}  {row['model']}"
    )


def remark(rows: Sequence[dict[str, Any]]) -> str | None:
    """A remark on rows of random weights that have another dimension than the paper's."""
    if any(row["model"] == RANDOM and row["paper"] not in (None, row["dimension"]) for row in rows):
        return "random weights have full rank; what the paper has more is a property of trained ones: name the model"
    return None


def plot_table_4(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """All spectra, relative to their largest singular value."""
    figure, ((axes,),) = canvas(6.75)
    for row in rows:
        values = row["singular_values"]
        label = f"{row['features']}, patch {row['patch'][1]}: {row['dimension']} ({Path(row['model']).name})"
        axes.plot(range(1, len(values) + 1), [max(value / values[0], 1e-10) for value in values], label=label)
    axes.set(xlabel="index", ylabel="singular value / largest", yscale="log", title="features, patch: dimension")
    axes.legend(fontsize="x-small")
    return save_png(figure, path)
