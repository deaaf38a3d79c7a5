import argparse

import pytest

from sana.utils.cli import Parser, at_least, boolean, numbers, words


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (at_least(1), "12", 12),
        (at_least(-1), "-1", -1),
        (boolean, "True", True),
        (boolean, "false", False),
        (words, "[a, b]", ["a", "b"]),
        (words, "a", ["a"]),
        (numbers, "[0.2,1]", (0.2, 1.0)),
    ],
)
def test_types(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(at_least(1), "0"), (at_least(0), "1.5"), (at_least(0), "--1"), (boolean, "1"), (numbers, "[a]")],
)
def test_wrong_values_are_repeated(kind, text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=f"got '{text}'".replace("[", r"\[").replace("]", r"\]")
    ):
        kind(text)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("two\nlines"), 2), (ArithmeticError("two\n  lines"), 1), (OSError("two lines"), 1)],
)
def test_errors_are_one_line(capsys, error, status):
    def fail():
        raise error

    with pytest.raises(SystemExit) as left:
        Parser(prog="draw.py").run(fail)
    assert left.value.code == status
    assert capsys.readouterr() == ("", "draw.py: error: two lines\n")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(TypeError):
        Parser().run(len)


def test_wrong_flags_are_one_line(capsys):
    parser = Parser(prog="draw.py")
    parser.add_argument("--steps", type=at_least(1))
    for arguments in (["--steps=0"], ["--step=1"], ["--steps"]):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(arguments)
        assert left.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_misspelt_flag_is_not_taken_for_a_config_key(capsys):
    parser = Parser(prog="draw")
    parser.add_argument("--cfg_scale")
    assert parser.parse_known_args(["--model.cfg_scale=2", "--work_dir=x"])[1] == [
        "--model.cfg_scale=2",
        "--work_dir=x",
    ]
    for word in ("--cfg_scal=3", "--cfgscale"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_known_args([word])
        assert (
            capsys.readouterr().err
            == f"draw: error: unknown flag {word.removesuffix('=3')}; did you mean --cfg_scale?\n"
        )
