"""Find methods by name without importing them.

A method is one entry point in the group `trackpl.methods`: its name is what users type, its value the class.
Listing reads package metadata only, which takes milliseconds; a broken plugin harms only who asks for it.
"""

import configparser
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions

from trackpl import __version__
from trackpl.errors import PluginError, closest

GROUP = "trackpl.methods"


@dataclass(frozen=True)
class Plugin:
    """One registered method."""

    name: str  # what users type
    class_path: str  # dotted
    package: str  # the distribution that registers it
    version: str
    entry: EntryPoint
    fault: str = ""  # what is wrong as far as the metadata can tell

    def __str__(self) -> str:
        return f"method '{self.name}' of {self.package} {self.version}"

    def load(self) -> type:
        """Import the class; raise `PluginError` if it cannot be had or is not a method for this trackpl."""
        if self.fault:
            raise PluginError(f"{self}: {self.fault}")
        import_module("trackpl.method")  # first: what is wrong with trackpl itself is no plugin's fault
        try:
            found = self.entry.load()
        # A stranger's module may do anything on import, `sys.exit()` included.
        except (Exception, SystemExit) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
            raise PluginError(f"{self}: cannot be imported ({cause}); {self._remedy(error)}") from error
        self._check(found)
        return found

    def _remedy(self, error: BaseException) -> str:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing and missing != self.class_path.partition(".")[0]:
            return f"install '{missing}', which {self.package} needs"
        return f"fix, upgrade or uninstall {self.package}"

    def _check(self, found: object) -> None:
        from trackpl.method import CONTRACT, Method

        if not (isinstance(found, type) and issubclass(found, Method)):
            fault = f"{self.entry.value} is not a subclass of trackpl.Method"
            raise PluginError(f"{self}: {fault}; fix or uninstall {self.package}")
        theirs = found.contract
        if theirs != CONTRACT:
            upgrade = "trackpl" if isinstance(theirs, int) and theirs > CONTRACT else self.package
            raise PluginError(
                f"{self}: made for contract {theirs}, but trackpl {__version__} has contract {CONTRACT}; "
                f"pip install --upgrade {upgrade}"
            )


def plugins() -> dict[str, Plugin]:
    """Return all registered methods by name; one that cannot be used carries its `fault`."""
    claims: dict[str, list[Plugin]] = {}
    seen: set[str] = set()
    for distribution in distributions():
        pairs = list(_entries(distribution))
        if not pairs:
            continue
        package, version = _identity(distribution)
        key = re.sub(r"[-_.]+", "-", package).lower()
        if key in seen:  # one distribution on two entries of sys.path: the first counts, as in an import
            continue
        seen.add(key)
        for name, value in pairs:
            claims.setdefault(name, []).append(_plugin(name, value, package, version))
    return {name: _settle(rivals) for name, rivals in sorted(claims.items())}


def find(name: str) -> Plugin:
    """Return the method called `name`; raise `PluginError` if there is none, or none that can be used."""
    known = plugins()
    if name not in known:
        raise PluginError(f"no installed method is called '{name}'; {closest(name, known)}")
    if known[name].fault:
        raise PluginError(f"{known[name]}: {known[name].fault}")
    return known[name]


def find_class(class_path: str) -> type:
    """Import the registered method whose dotted class path this is, and no other plugin."""
    usable_last = sorted(plugins().values(), key=lambda plugin: not plugin.fault)  # a class may have two names
    known = {plugin.class_path: plugin for plugin in usable_last}
    if class_path not in known:
        raise PluginError(f"no installed method has the class '{class_path}'; {closest(class_path, known)}")
    return known[class_path].load()


def _entries(distribution: Distribution) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the group; read leniently, because one bad line must not hide other packages."""
    text = _entry_points(distribution)
    if GROUP not in text:
        return
    parser = configparser.ConfigParser(
        delimiters=("=",), allow_no_value=True, strict=False, interpolation=None, default_section=""
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(text)
    except configparser.Error as error:
        yield _identity(distribution)[0], " ".join(str(error).split())
        return
    if parser.has_section(GROUP):
        yield from ((name, value or "") for name, value in parser.items(GROUP))


def _entry_points(distribution: Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except (
        OSError,
        UnicodeDecodeError,
    ):  # unreadable to every tool, so whatever it registers is not installed
        return ""


def _identity(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata
    return metadata["Name"] or "an unnamed package", metadata["Version"] or "(no version)"


def _plugin(name: str, value: str, package: str, version: str) -> Plugin:
    target = value.partition("[")[0].strip()  # `module:Class [extra]` is legal
    fault = ""
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", target):
        fault = f"malformed entry point '{name} = {value}', must be 'name = package.module:Class'"
    elif not re.fullmatch(r"[\w-]+", name):
        fault = f"malformed name '{name}', must be letters, digits, '_' or '-'"
    if fault:
        fault += f"; fix or uninstall {package}"
    return Plugin(name, target.replace(":", "."), package, version, EntryPoint(name, target, GROUP), fault)


def _settle(rivals: list[Plugin]) -> Plugin:
    """Return the only claimant of a name, or the first one with a fault that names the others."""
    if len(rivals) == 1:
        return rivals[0]
    others = " and ".join(f"{p.package} {p.version}" for p in rivals[1:])
    fault = f"conflict, {others} registers the same name; uninstall all but one"
    return replace(rivals[0], fault=fault)
