"""What the verbs' command lines share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from cohobate.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('cohobate ')}: {message}")


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace | None:
    """Parsed arguments, or None when --help was printed."""
    try:
        return parser.parse_args(arguments)
    except SystemExit:
        return None


def near(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing when no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
