"""Addresses of sets of shards: paths, file://, http(s)://, s3:// and gs://, and nothing else.

No other scheme, no pipe, no chain of file systems and no variable is ever looked at: addresses stand in configs, and
those come from strangers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from trackpl.errors import DataError

_ALLOWED = "a local path (./ before one with a colon), file:///..., http://..., https://..., s3://bucket/... or gs://bucket/..."


def is_remote(address: str | os.PathLike[str]) -> bool:
    """Say whether an address is to be fetched (http, https, s3, gs or gcs), rather than a local path or file:// one.

    Raises:
        DataError: an address of any other kind, or one that is incomplete.
    """
    return parse(address)[0] != "file"


def local_path(address: str | os.PathLike[str]) -> Path:
    """Return the path that a local address names, itself a path or ``file:///path``.

    Raises:
        DataError: the address is not local, or of a kind that is not allowed.
    """
    scheme, rest = parse(address)
    if scheme != "file":
        raise DataError(f"'{shown(address)}' is no local path")
    return Path(rest)


def beside(address: str, name: str) -> str:
    """Return the address of the file `name` in the folder of the file that `address` names."""
    scheme, rest = parse(address)
    if scheme == "file":
        return str(Path(rest).with_name(name))
    if scheme in ("s3", "gs"):
        return f"{scheme}://{rest.rpartition('/')[0]}/{name}"
    parts = urlsplit(f"{scheme}:{rest}")
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def shown(address: str | os.PathLike[str]) -> str:
    """Return an address as it may be printed: without the password and the query, which often holds a key."""
    text = os.fspath(address)[:500]
    text = re.sub(r"^([A-Za-z][\w+.-]*://)[^/@?#]*@", r"\1", text)
    return re.sub(r"\?.*", "?...", text, flags=re.DOTALL) if re.match(r"https?:", text, re.IGNORECASE) else text


def parse(address: str | os.PathLike[str]) -> tuple[str, str]:
    """Split an address into its scheme (file, http, https, s3, gs) and path, ``bucket/key`` or the rest of the URL."""
    text = os.fspath(address)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    drive = re.match(r"[A-Za-z]:[\\/]", text)
    if "\0" in text:
        raise _refused(address, "it has a zero byte")
    if found is None or drive:
        return "file", text
    scheme, rest = found[1].lower().replace("gcs", "gs"), text[found.end() :]
    if scheme == "file":
        return scheme, _file(address, rest)
    if scheme not in ("http", "https", "s3", "gs"):
        raise _refused(address, f"'{found[1]}:' is not allowed")
    if re.search(r"[\x00-\x20\x7f]", text):
        raise _refused(address, "it has a space or control character; write it as %20")
    if not rest.startswith("//"):
        raise _refused(address, f"'{found[1]}:' must be followed by //")
    if scheme in ("s3", "gs"):
        bucket, _, key = rest[2:].partition("/")
        if not re.fullmatch(r"[\w.-]+", bucket) or not key or "::" in key:
            raise _refused(address, "it must name a bucket and a file in it")
        return scheme, rest[2:]
    try:
        parts = urlsplit(f"{scheme}:{rest}")
        whole = bool(parts.hostname) and parts.port != 0 and not parts.fragment
    except ValueError:
        whole = False
    if not whole or "::" in parts.path + parts.query:
        raise _refused(address, "it must name one host and one file there")
    return scheme, rest


def _file(address: str | os.PathLike[str], rest: str) -> str:
    """Return the path of a ``file:`` address without its scheme."""
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    path = unquote(path, errors="surrogateescape")
    if slash != "/" or host not in ("", "localhost") or "\0" in path:
        raise _refused(address, "a file: address must hold an absolute path")
    return path if re.match(r"[A-Za-z]:[\\/]", path) else f"/{path}"


def _refused(address: str | os.PathLike[str], why: str) -> DataError:
    return DataError(f"'{shown(address)}' is no address of a set of shards: {why}; allowed: {_ALLOWED}")
