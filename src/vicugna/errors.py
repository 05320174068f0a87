"""The one exception type that users meet: what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VicugnaError(Exception):
    """An error a user can act on. The CLI prints it as one line and exits with `exit_code`.

    `what` says what was wrong, `where` names the file, key or line, `fix` says what to do.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.fix}" if self.fix else text


class Refused(VicugnaError):
    """The input was fine and the answer is no: a gate refused or a verification failed."""

    exit_code = 1


def config_error(what: str, fix: str = "Correct it, or restore the original") -> VicugnaError:
    """The error about a config.json whose values are impossible, or not supported."""
    return VicugnaError(what, "config.json", fix)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What to do about an unknown `name`: the nearest of `known`, or else all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}"
