"""The paper's figures and tables, each by one command; on the built-in digits, or on any model and images.

    python recipes/reproduce.py figure2                                     (built-in digits, a minute or two)
    python recipes/reproduce.py figure3 --config recipes/configs/figures-cifar10.yaml --model_name_or_path M
    accelerate launch recipes/reproduce.py figure4 --model_name_or_path M --dataset_name D --noises RUN_OR_HUB_ID

    figure2   influence and matching predictions against the norm over lambda (equation 6), learned against permuted
    figure3   norm of the noise and robustness groups along fine-tuning, relative to the start, beside a plain control
    figure4   scaled noises, and the contour of linear combinations of pairs (A.5)
    table4    dimension of the patch embedding's nullspace (A.4); more of that: recipes/analyze.py
    table5    influence of the noises along figure 3's fine-tuning (A.6)

Writes FIGURE.json and FIGURE.png to --output_dir. Finished points are kept in points/ and found again, unless model,
data or settings changed. What the paper says is printed beside, marked as quoted.
"""

import contextlib
import sys
from pathlib import Path

from accelerate import PartialState

from figures import figure_2, figure_3, figure_4, table_4, table_5
from figures.setting import FigureArguments, FigureConfig, Setting
from hf_nullspace.command_line import UsageError, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.robustness.progress import Progress
from hf_nullspace.training.loading import DataArguments, ModelArguments

DIGITS = Path(__file__).parent / "configs" / "figures-digits.yaml"
FIGURES = {
    "figure2": figure_2.make,
    "figure3": figure_3.make,
    "figure4": figure_4.make,
    "table4": table_4.make,
    "table5": table_5.make,
}


def main() -> None:
    figure, words = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if figure not in FIGURES and "--help" not in sys.argv and "-h" not in sys.argv:
        raise UsageError(f"{figure or 'nothing'!r} is no figure; the first word is one of {', '.join(FIGURES)}")
    args, model_args, data_args, config = parse(
        (FigureArguments, ModelArguments, DataArguments, FigureConfig),
        str(__doc__),
        words if figure in FIGURES else ["--help"],
        default_config=lambda words: None if any("_name" in word.partition("=")[0] for word in words) else DIGITS,
    )
    state = PartialState()
    bar = Progress(shown=state.is_main_process and not config.disable_tqdm)
    with only_run_in(str(config.output_dir)), contextlib.closing(bar):  # an error gets a line of its own
        FIGURES[figure](Setting(args, model_args, data_args, config, state, bar))


if __name__ == "__main__":
    run(main)
