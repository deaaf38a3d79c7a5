"""What command lines share: argument types, and errors that are one line on stderr."""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sana.utils.logging import hush_imports
from sana.utils.oom import is_out_of_memory


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag in one line, with exit status 2, and wants flags in full."""

    def __init__(self, **settings: object) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": formatter, "allow_abbrev": False} | settings)

    def parse_known_args(self, *arguments: Any, **settings: Any) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but a word that is nearly a flag of this command is an error: it would be read as a config's key."""
        found, rest = super().parse_known_args(*arguments, **settings)
        for word in rest:
            name = word.partition("=")[0]
            if near := difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.85):
                self.error(f"unknown flag {name}; did you mean {near[0]}?")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function`, and leave in one line where the user's input (status 2) or the machine (status 1) is wrong.

        ValueError is for input; ArithmeticError, OSError and memory that runs out, in whatever form, are not. Anything else is
        our own mistake and keeps its traceback.
        """
        hush_imports()
        try:
            function(*arguments)
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.error(" ".join(str(error).split()))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            text = " ".join(str(error).split())
            if is_out_of_memory(error):
                text = text if text.startswith("out of memory") else f"out of memory: {text}".rstrip(": ")
            elif not isinstance(error, ArithmeticError | OSError):
                raise
            self.exit(1, f"{self.prog}: error: {text}\n")


def at_least(lowest: int) -> Callable[[str], int]:
    """Argument type: an integer with a lower bound."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {lowest}, got {text!r}")
        return int(text)

    return parse


def boolean(text: str) -> bool:
    """Argument type: "true" or "false"."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def words(text: str) -> list[str]:
    """Argument type: "[a,b]" or "a,b"."""
    return [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def numbers(text: str) -> tuple[float, ...]:
    """Argument type: "[0.2,0.8]" or "0.2,0.8"."""
    try:
        return tuple(map(float, words(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as [0.2,0.8], got {text!r}") from error
