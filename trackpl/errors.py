"""Errors that speak to the user: one line that says what was given, what is allowed and what to do."""

import difflib
from collections.abc import Iterable


class Error(Exception):
    """A user's mistake or a broken input; the command line prints it as one line and exits with status 2."""


class PluginError(Error):
    """A method's plugin cannot be found or used."""


class CheckpointError(Error):
    """A checkpoint does not fit the method it was given to."""


class DataError(Error):
    """A data set, shard or sample is missing or broken."""


class UnreachableError(DataError):
    """The server that has the data gave no usable answer, however often it was asked."""


class VideoError(Error):
    """A video or a folder of frames cannot be read."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """Say what `given` may have meant: ``did you mean 'x'?``, or the list of what is allowed."""
    allowed = sorted(allowed)
    found = difflib.get_close_matches(given, allowed, n=1)
    return f"did you mean '{found[0]}'?" if found else f"allowed: {', '.join(allowed) or 'none'}"
