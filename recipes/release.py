"""Release a finished run on the Hub: checked, measured again, carded, pushed, pulled back and compared.

    python recipes/release.py --run outputs/mine --repo ORG/NAME --dry-run      (all but the push)
    python recipes/release.py --run outputs/mine --repo ORG/NAME --private
    python recipes/release.py --metric ORG/robustness                           (the metric, as a Space)
    python recipes/release.py --run outputs/mine --keep mine                    (only the records and the card here)
    python recipes/release.py --render                                          (every card of model_cards/ again)

The exit code is 1 where a run is not fit to be released; what is wrong stands above it.
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
        release_metric(args)
    elif args.repo:
        check_complete(Path(args.run))
        with only_run_in(args.run):
            release_run(args, Path(args.run))
    elif args.keep:
        check_complete(Path(args.run))
        with only_run_in(args.run):
            about = {"license": args.license, "note": args.note}
            print(f"Records: {keep_records(Path(args.run), args.keep, Path(args.records), **about)}")
    if not args.metric:
        cards = render_cards(Path(args.records), (HERE / "configs").glob(PLANNED), Path(args.cards))
        print(f"Cards in {args.cards}: {', '.join(card.name for card in cards)}")


def release_run(args: ReleaseArguments, folder: Path) -> None:
    if args.recheck_images:
        print(f"Loading it afresh and measuring again on at most {args.recheck_images} images")
        answers = recheck(folder, args.recheck_images, args.dataset_name)
        for answer in answers:
            print(f"  {'as recorded' if answer.passed else 'NOT AS RECORDED'}  {answer}")
        if not all(answer.passed for answer in answers):
            fail("the weights in this folder are not those that were measured; measure them, then release")

    with tempfile.TemporaryDirectory() as staged:
        stage(folder, Path(staged), args.repo, license=args.license, note=args.note)
        print(*listing(Path(staged)), sep="\n")
        if args.dry_run:
            print(f"Nothing was pushed. Without --dry-run these files go to {args.repo} as one commit")
        else:
            place = push_and_verify(Path(staged), args.repo, private=args.private or None, repeat=said_again())
            print(f"Pushed, pulled back and compared: {place}")
    name = args.repo.rpartition("/")[2]
    keep_records(folder, name, Path(args.records), repo_id=args.repo, license=args.license, note=args.note)


def release_metric(args: ReleaseArguments) -> None:
    with tempfile.TemporaryDirectory() as staged:
        write_space(staged, args.metric)
        print(*listing(Path(staged)), sep="\n")
        if args.dry_run:
            print(f"Nothing was pushed. Without --dry-run these files go to the Space {args.metric}")
            return
        place = push_and_verify(
            Path(staged), args.metric, private=args.private or None, repeat=said_again(), repo_type="space"
        )
    print(f"Pushed, pulled back and compared: {place}")
    print(f"Use it: evaluate.load({args.metric!r})")


def check_complete(folder: Path) -> None:
    if missing := what_is_missing(folder):
        fail(f"{folder} is not complete:", *missing)


def fail(*lines: str) -> None:
    print(*lines, sep="\n  ", file=sys.stderr)
    sys.exit(1)


def said_again() -> str:
    return shlex.join(["python", "recipes/release.py", *sys.argv[1:]])


if __name__ == "__main__":
    run(main)
