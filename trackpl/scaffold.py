"""Write the distribution of a new method: `trackpl new NAME`.

The folder `templates` holds a real plugin called `mymethod`, linted and type-checked like any code; a new one
is a copy of it under another name.
"""

import keyword
import os
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

from trackpl import __version__
from trackpl.errors import Error
from trackpl.plugins import plugins

TEMPLATES = Path(__file__).parent / "templates"


def write(name: str, out: str | Path = ".") -> Path:
    """Write `trackpl-<name>` into the folder `out`, whole or not at all, and return its path.

    Raises:
        Error: the name cannot be used, the folder is there already, or nothing can be written to `out`.
    """
    _check_name(name)
    folder = Path(out) / f"trackpl-{name}"
    if os.path.lexists(folder):
        raise Error(f"{folder} exists already and is left as it is; choose another name or --out DIR")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for path, text in _files(name).items():
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).write_text(text, encoding="utf-8")
        beside.rename(folder)
    except OSError as error:
        raise Error(f"cannot write {folder}: {error.strerror}; choose another --out DIR") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def guide(folder: Path, name: str) -> str:
    """Return what to tell the user who has just got `folder`."""
    where = shlex.quote(str(folder))
    return f"""\
{folder} holds a small tracker that already learns; make it yours in trackpl_{name}/method.py. Next:

  pip install -e {where}
  pytest {where}
  trackpl fit --config {where}/configs/{name}.yaml
  trackpl fit --model {name} --help"""


def class_name(name: str) -> str:
    """Return `MyTracker` for `my_tracker`."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _files(name: str) -> dict[Path, str]:
    """Return the text of every file of the new distribution by its path in it."""
    return {
        Path(_rename(path.relative_to(TEMPLATES).as_posix(), name)): _rename(path.read_text("utf-8"), name)
        for path in sorted(TEMPLATES.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _rename(text: str, name: str) -> str:
    text = text.replace("mymethod", name).replace("MyMethod", class_name(name))
    return text.replace('"trackpl>=0"', f'"trackpl>={__version__}"')


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise Error(
            f"{name!r} cannot name a method; allowed: lower-case letters, digits and '_', a letter first, "
            f"no word of Python; did you mean '{_usable(name)}'?"
        )
    if plugin := plugins().get(name):
        raise Error(f"the name '{name}' is taken by {plugin.package} {plugin.version}; choose another")
    if find_spec(f"trackpl_{name}"):
        raise Error(f"a package trackpl_{name} is installed already; choose another name than '{name}'")
    code = (TEMPLATES / "trackpl_mymethod" / "method.py").read_text("utf-8")
    if re.search(rf"\b{class_name(name)}\b", code):
        raise Error(f"'{name}' would make a class {class_name(name)}, a word its code uses; choose another")


def _usable(name: str) -> str:
    """Return an allowed name that is as near as can be to `name`."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
    allowed = re.match(r"[a-z]", plain) and not keyword.iskeyword(plain)
    return plain if allowed else f"tracker_{plain}".strip("_")
