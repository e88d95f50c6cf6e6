"""Release a finished run on the Hub: checked, measured again, carded, pushed, pulled back and compared.

    python recipes/release.py --run outputs/mine --repo ORG/NAME --dry-run      (all but the push)
    python recipes/release.py --run outputs/mine --repo ORG/NAME --private
    python recipes/release.py --metric ORG/robustness                           (the metric, as a Space)
    python recipes/release.py --run outputs/mine --keep mine                    (only the records and the card here)
    python recipes/release.py --render                                          (every card of model_cards/ again)

The exit code is 1 where a run is not fit to be released; what is wrong is printed.
"""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hf_nullspace.command_line import UsageError, option, parse, run
from hf_nullspace.core.files import only_run_in
from hf_nullspace.core.settings import check_numbers
from hf_nullspace.core.uploads import check_ready
from hf_nullspace.hub.metric import write_space
from hf_nullspace.hub.recheck import IMAGES, recheck, what_is_missing
from hf_nullspace.hub.release import keep_records, listing, push_and_verify, render_cards, stage

HERE = Path(__file__).resolve().parent
PLANNED = "vit-*-imagenet.yaml"  # configurations with a card before they were run


@dataclass
class ReleaseArguments:
    """What is released, and where to."""

    _group_title: ClassVar[str] = "Release"

    run: str | None = option(None, "Folder of a finished run: the --output_dir of recipes/finetune.py.")
    repo: str | None = option(None, "Repository of the model: ORG/NAME.")
    metric: str | None = option(None, "Repository of the metric as a Space: ORG/NAME, NAME as a Python module.")
    keep: str | None = option(None, "Keep the run's records and card under this name, without any repository.")
    render: bool = option(False, "Render the cards of all records and planned configurations again.")
    dry_run: bool = option(False, "Everything but the push: prints the files that it would send.")
    private: bool = option(False, "A new repository is private; without it, what the organisation's default says.")
    license: str | None = option(None, "Licence of the weights, as the Hub names it, for example apache-2.0.")
    note: str | None = option(None, "A sentence on the run for its card: its commit, machine, how often it was run.")
    dataset_name: str | None = option(None, "Where the recorded evaluation's images are now, if not where they were.")
    recheck_images: int = option(IMAGES, "Measure again on the first so many images; 0: leave that out.")
    cards: str = option(str(HERE.parent / "model_cards"), "Folder of the rendered cards.")
    records: str = option(str(HERE.parent / "benchmarks" / "results"), "Folder of the records they are rendered from.")

    def __post_init__(self) -> None:
        named = [name for name in ("repo", "metric", "keep", "render") if getattr(self, name)]
        if len(named) != 1:
            raise UsageError(
                "give one of --run DIR --repo ORG/NAME, --run DIR --keep NAME, --metric ORG/NAME, --render"
            )
        if (self.run is None) is (named[0] in ("repo", "keep")):
            raise UsageError(f"--{named[0]} {'needs --run DIR' if self.run is None else 'takes no --run'}")
        for name in ("repo", "metric"):
            value = getattr(self, name)
            if value and (value.count("/") != 1 or not all(value.split("/"))):
                raise UsageError(f"--{name} {value}: expected ORG/NAME")
        if self.keep and (self.keep in (".", "..") or Path(self.keep).name != self.keep):
            raise UsageError(f"--keep {self.keep}: expected a name, not a path")
        check_numbers(self, {"recheck_images": "int [0, inf)"})


def main() -> None:
    (args,) = parse((ReleaseArguments,), str(__doc__))
    if not args.dry_run and (args.repo or args.metric):
        check_ready()
    if args.metric:
        with tempfile.TemporaryDirectory() as staged:
            write_space(staged, args.metric)
            send(Path(staged), args.metric, args, repo_type="space")
        return
    if args.run:
        folder = Path(args.run)
        if missing := what_is_missing(folder):
            fail(f"{folder} is not complete:", *missing)
        about = {"license": args.license, "note": args.note}
        with only_run_in(folder):
            if args.repo:
                measure_again(folder, args)
                with tempfile.TemporaryDirectory() as staged:
                    stage(folder, Path(staged), args.repo, **about)
                    send(Path(staged), args.repo, args)
            name = args.keep or args.repo.rpartition("/")[2]
            print(f"Records: {keep_records(folder, name, Path(args.records), repo_id=args.repo, **about)}")
    cards = render_cards(Path(args.records), (HERE / "configs").glob(PLANNED), Path(args.cards))
    print(f"Cards in {args.cards}: {', '.join(card.name for card in cards)}")


def measure_again(folder: Path, args: ReleaseArguments) -> None:
    if not args.recheck_images:
        return
    print(f"Loading it afresh and measuring again on at most {args.recheck_images} images")
    answers = recheck(folder, args.recheck_images, args.dataset_name)
    for answer in answers:
        print(f"  {'as recorded' if answer.passed else 'NOT AS RECORDED'}  {answer}")
    if not all(answer.passed for answer in answers):
        fail("the weights in this folder are not those that were measured; measure them, then release")


def send(staged: Path, repo_id: str, args: ReleaseArguments, repo_type: str = "model") -> None:
    print(*listing(staged), sep="\n")
    if args.dry_run:
        place = f"the Space {repo_id}" if args.metric else repo_id
        print(f"Nothing was pushed. Without --dry-run these files go to {place} as one commit")
        return
    repeat = shlex.join(["python", "recipes/release.py", *sys.argv[1:]])
    address = push_and_verify(staged, repo_id, private=args.private or None, repeat=repeat, repo_type=repo_type)
    print(f"Pushed, pulled back and compared: {address}")
    if args.metric:
        print(f"Use it: evaluate.load({repo_id!r})")


def fail(*lines: str) -> None:
    print(*lines, sep="\n  ", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    run(main)
