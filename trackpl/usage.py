"""Arguments of the verbs that do not train."""

import argparse
import re
from typing import Any, NoReturn

from trackpl.errors import Error


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, like every other error of the user."""

    def __init__(self, verb: str, description: str, **options: Any) -> None:
        super().__init__(prog=f"trackpl {verb}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message instead of printing it under a page of usage."""
        raise Error(f"{message}; see {self.prog} --help")


def device_of(name: str) -> str:
    """Return the device that --device names; "auto" is the GPU where there is one.

    Raises:
        Error: another word, or a GPU where torch sees none.
    """
    import torch  # not before it is needed: the cheap verbs parse their arguments here too

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise Error(f"--device {name}: allowed: auto, cpu, cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise Error(f"--device {name}: torch sees no GPU here; use --device cpu")
    return name
