"""YAML gives defaults, options win, typos name their neighbours, and errors are one line."""

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_nullspace import NullspaceConfig
from hf_nullspace.command_line import UsageError, parse, run


@dataclass
class Parent:
    """Fields of a parent class."""

    _group_title = "Inherited"
    patience: int = field(default=3, metadata={"help": "How long."})
    rate: float = field(default=2.0, metadata={"help": "The child has another."})


@dataclass
class Options(Parent):
    """What the test recipe takes."""

    _group_title = "Own"
    rate: float = field(default=1.0, metadata={"help": "How fast."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Who."})
    flag: bool = field(default=False, metadata={"help": "Whether."})
    keep: bool = field(default=True, metadata={"help": "Still."})
    limit: int | None = field(default=5, metadata={"help": "How far."})


def parse_options(*words):
    return parse((Options,), "A test.", words)[0]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("rate: 1e-5\nnames: [b, c]\nflag: true\nlimit: null\n")
    return path


def test_yaml_gives_defaults_and_options_override_them(config):
    assert parse_options() == Options()
    from_file = parse_options("--config", str(config))
    assert from_file == Options(rate=1e-5, names=["b", "c"], flag=True, limit=5)  # null: as without the file
    both = parse_options(f"--config={config}", "--rate", "2", "--flag", "false", "--no_keep")
    assert (both.rate, both.names, both.flag, both.keep) == (2.0, ["b", "c"], False, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rat", "2"], r"unknown option '--rat'; did you mean --rate"),
        (["--nmaes=x"], r"unknown option '--nmaes=x'; did you mean --names"),
        (["--zzzzzz", "2"], "unknown option '--zzzzzz'; --help lists the valid ones"),
        (["--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--rate", "1", "2"], "'2' belongs to no option"),
        (["--config", "nowhere/x.yaml"], "no configuration file"),
        (["--config", "a", "--config=b"], "expected one file"),
    ],
)
def test_typos_name_their_neighbours(words, message):
    with pytest.raises(UsageError, match=message):
        parse_options(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rtae: 2\n", r"unknown key 'rtae' in .*y\.yaml; did you mean rate"),
        (b"- rate\n", "expected lines of the form 'key: value'"),
        (b"rate: [1\n", "no valid YAML"),
        (b"rate: 1\nlimit: 2\nrate: 3\n", r"no valid YAML: .*the key 'rate' twice"),
        ("names: [é]\n".encode("latin-1"), "no text in UTF-8"),
    ],
)
def test_a_mistake_in_the_file_is_an_error(tmp_path, content, message):
    path = tmp_path / "y.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        parse_options("--config", str(path))


def test_a_file_that_is_not_there_names_those_beside_it(config):
    with pytest.raises(UsageError, match=f"{config.parent} has x"):
        parse_options("--config", str(config.with_name("z.yaml")))


def test_help_is_grouped_with_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_options("--help")
    text = capsys.readouterr().out
    assert text.index("Own:") < text.index("--rate") < text.index("Inherited:") < text.index("--patience")
    assert "How fast. (default: 1.0)" in text
    assert "Still. (default: True)" in text
    assert text.count("--rate") == 1
    assert "--no" not in text  # --no_keep is an option, and not shown


def test_help_of_the_real_configuration_puts_the_method_before_the_trainer(capsys):
    with pytest.raises(SystemExit):
        parse((NullspaceConfig,), "", ["--help"])
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("Nullspace fine-tun", "--epsilon", "TrainingArguments:", "--adam_beta1")]
    assert places == sorted(places)


def test_errors_of_the_configuration_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match=r"epsilon=-1\.0"):
        parse((NullspaceConfig,), "", ["--epsilon", "-1", "--output_dir", str(tmp_path)])


def test_run_prints_one_line_for_what_its_user_can_mend(capsys):
    def misused():
        raise UsageError("first line\n   second line")

    with pytest.raises(SystemExit) as stopped:
        run(misused)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: first line second line\n"

    def missing():
        Path("/nowhere/at/all").read_text()

    with pytest.raises(SystemExit):
        run(missing)
    assert "No such file or directory: '/nowhere/at/all'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_is_one_line_and_its_exit_code(capsys, monkeypatch, number, name, code):
    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception:
            pytest.fail("a signal is no error to be handled")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            run(main)
        assert stopped.value.code == code
        error = capsys.readouterr().err
        assert error.count("\n") == lines
        assert error.count(f"stopped by {name}. Start the same command again") == lines
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    signal.signal(signal.SIGINT, before)


def test_run_lets_bugs_through(monkeypatch):
    with pytest.raises(json.JSONDecodeError):  # a ValueError, but not one that this package raised for its user
        run(lambda: json.loads("{"))
    with pytest.raises(TypeError):
        run(lambda: len(3))  # type: ignore[arg-type]
    monkeypatch.setenv("HF_NULLSPACE_TRACEBACK", "1")
    with pytest.raises(UsageError):
        run(lambda: parse_options("--nothing"))
