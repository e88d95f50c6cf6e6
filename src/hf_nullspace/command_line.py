"""The command line of the recipes: YAML gives the defaults, options override them, and a typo is an error.

accelerate launch recipes/finetune.py --config recipes/configs/digits.yaml --epsilon 0.1
"""

import dataclasses
import inspect
import json
import os
import signal
import sys
import threading
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Any

import huggingface_hub
import transformers
import yaml
from transformers import HfArgumentParser

from hf_nullspace.core.launcher import end_with_launcher
from hf_nullspace.core.settings import nearest

_NO_NEAR_NAME = "--help lists the valid ones"


class UsageError(ValueError):
    """The command line or the configuration file cannot be understood; the message is for the person who typed it."""


def option(default: Any, text: str) -> Any:
    """A field of a recipe's dataclass with its help text; a list is copied for every instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy if default else list, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def parse(
    types: Sequence[Any],
    description: str,
    arguments: Sequence[str] | None = None,
    default_config: Callable[[Sequence[str]], Path | None] | None = None,
) -> tuple[Any, ...]:
    """One instance of every dataclass of ``types`` from ``--config FILE.yaml`` and options; options win.

    ``default_config`` chooses the file from the arguments where ``--config`` is not given. In ``--help`` an option is
    in the group of the class that defines the field (its ``_group_title``): a child class first, its parents last.

    Raises:
        UsageError: for an unknown key or option, naming the nearest valid ones, and for values that do not fit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(types, description)
    fields = {kind: [field.name for field in dataclasses.fields(kind) if field.init] for kind in types}
    names = [name for each in fields.values() for name in each]
    empty = [field.name for kind in types for field in dataclasses.fields(kind) if field.default_factory is list]
    path = _config_path(arguments) or (default_config(arguments) if default_config else None)
    if path is not None:
        arguments = [*_as_options(_read(path), names, empty, path), *arguments]
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), unknown[0])
        if not option.startswith("-"):
            raise UsageError(f"{option!r} belongs to no option that takes it; expected --option value")
        name, valid = option.partition("=")[0], [f"--{each}" for each in (*names, "config", "help")]
        raise UsageError(f"unknown option {option!r}{nearest(name, valid, most=3, otherwise=_NO_NEAR_NAME)}")
    try:
        return tuple(kind(**{name: getattr(namespace, name) for name in fields[kind]}) for kind in types)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from error


def run(main: Callable[[], None]) -> None:
    """Run a recipe; an error that its user can correct is one line on standard error and exit code 2, not a traceback.

    ``HF_NULLSPACE_TRACEBACK=1`` shows the traceback all the same. Ctrl-C and SIGTERM end it with one line and exit code
    130 or 143. The process ends when its launcher has died.
    """
    end_with_launcher()
    transformers.logging.disable_progress_bar()  # one per file that is read or written; downloads keep theirs
    huggingface_hub.utils.enable_progress_bars()
    before = signal.signal(signal.SIGTERM, _stop) if threading.current_thread() is threading.main_thread() else None
    try:
        main()
    except (KeyboardInterrupt, _Terminated) as error:
        name, number = ("SIGTERM", signal.SIGTERM) if isinstance(error, _Terminated) else ("Ctrl-C", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            _say(f"stopped by {name}. Start the same command again: what is finished is kept")
        sys.exit(128 + number)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("HF_NULLSPACE_TRACEBACK") or not _is_for_users(error):
            raise
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be a file on a full disk, or gone; there is the exit code, too
        print(line, file=sys.stderr, flush=True)


class _Terminated(BaseException):
    """A SIGTERM came; not an Exception, so that nothing on the way takes it for an error that it can handle."""


def _stop(number: int, frame: Any) -> None:
    raise _Terminated


def _is_for_users(error: BaseException) -> bool:
    """Errors that this package raises on purpose, and what files and the network answer; not bugs."""
    if isinstance(error, OSError | FloatingPointError) or type(error).__module__.startswith("hf_nullspace."):
        return True
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__")).startswith("hf_nullspace.")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The recipe's description as it is written, and the default of every option."""


class _Parser(HfArgumentParser):
    """Puts every option into the group of the class that defines its field, and raises instead of exiting."""

    def __init__(self, types: Sequence[Any], description: str) -> None:
        self.titles: dict[str, str] = {}
        self.groups: dict[str, Any] = {}
        for parent in (parent for kind in types for parent in kind.__mro__):
            for name in inspect.get_annotations(parent):
                self.titles.setdefault(name, getattr(parent, "_group_title", parent.__name__))
        usage = "%(prog)s [--config FILE.yaml] [--option value ...]"
        super().__init__(types, description=description, usage=usage, formatter_class=_Help, allow_abbrev=False)
        text = "Defaults for everything below; options override them."
        self.add_argument("--config", metavar="FILE.yaml", help=text)

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        title = self.titles.get(settings.get("dest", names[0].lstrip("-")))
        if title is None:  # --help and --config
            return super().add_argument(*names, **settings)
        if not self.groups:
            self.groups = {each: self.add_argument_group(each) for each in dict.fromkeys(self.titles.values())}
        if names[0].startswith("--no_"):
            settings["help"] = SUPPRESS
        return self.groups[title].add_argument(*names, **settings)

    def error(self, message: str) -> Any:
        raise UsageError(message)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, of plain values only.

    Raises:
        UsageError: if it is no YAML in UTF-8, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no valid YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """A repeated key is an error, as YAML demands; PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _config_path(arguments: list[str]) -> Path | None:
    given = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    given += [after for word, after in pairwise(arguments) if word == "--config"]
    if len(given) > 1:
        raise UsageError(f"--config {' and '.join(given)}: expected one file")
    return Path(given[0]) if given else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        others = sorted(other.stem for other in path.parent.glob("*.yaml"))
        hint = f"; {path.parent} has {', '.join(others)}" if others else ""
        raise UsageError(f"no configuration file {path}{hint}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}; expected lines of the form 'key: value'")
    return content


def _as_options(content: dict[str, Any], names: Sequence[str], empty: Collection[str], path: Path) -> list[str]:
    """The words of a configuration; an empty list is left out of the options in ``empty``, which have it by default."""
    options: list[str] = []
    for key, value in content.items():
        if key not in names:
            hint = nearest(key, names, most=3, otherwise=_NO_NEAR_NAME)
            raise UsageError(f"unknown key {key!r} in {path}{hint}")
        if value == [] and key in empty:
            continue
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options
