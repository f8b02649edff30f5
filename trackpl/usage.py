"""Arguments of the verbs that do not train."""

import argparse
from typing import Any, NoReturn

from trackpl.errors import Error


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, like every other error of the user."""

    def __init__(self, verb: str, description: str, **options: Any) -> None:
        super().__init__(prog=f"trackpl {verb}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message instead of printing it under a page of usage."""
        raise Error(f"{message}; see {self.prog} --help")
