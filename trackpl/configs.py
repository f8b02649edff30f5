"""Find the configs that come with trackpl, and the user's own, by bare name: `--config crw_multiscale`."""

import sysconfig
from pathlib import Path

from trackpl.errors import Error, closest

SUFFIXES = (".yaml", ".yml")


def folders() -> list[Path]:
    """Return where configs are looked for, first wins: ``./configs``, the source tree, the installed data files."""
    user = sysconfig.get_preferred_scheme("user")
    places = [
        Path("configs"),
        Path(__file__).resolve().parent.parent / "configs",
        Path(sysconfig.get_path("data")) / "share/trackpl/configs",
        Path(sysconfig.get_path("data", user)) / "share/trackpl/configs",
    ]
    return [place for place in places if place.is_dir()]


def names() -> list[str]:
    """Return the bare names of all configs that can be found, such as ``hardware/cpu``; those in ``sweeps`` are not."""
    found = {path.relative_to(folder) for folder in folders() for path in folder.rglob("*") if path.suffix in SUFFIXES}
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] != "sweeps")


def find(name: str) -> Path:
    """Return the config called `name`: a file of that path, else one of that bare name.

    Raises:
        Error: there is none; the message holds the closest match.
    """
    literal = Path(name).expanduser()
    if literal.is_file():
        return literal
    if literal.is_dir():
        raise Error(f"config '{name}' is a folder; give a YAML file or one of {', '.join(names())}")
    for folder in folders():
        for suffix in ("", *SUFFIXES):
            path = folder / f"{name}{suffix}"
            if path.is_file() and path.suffix in SUFFIXES:
                return path
    bare = Path(name).stem if literal.suffix in SUFFIXES else name
    raise Error(f"no config '{name}': no such file and no such name; {closest(bare, names())}")
