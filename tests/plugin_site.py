"""A folder of hand-made distributions, as pip would leave them in site-packages."""

from pathlib import Path

GOOD = """
from trackpl.method import Info, Method
from trackpl.types import Tracks


class Good(Method):
    info = Info(title="", paper="", licence="")
    contract = 1

    def track(self, clip, queries):
        raise AssertionError("not called")
"""


def install(
    site: Path,
    name: str,
    code: str = GOOD,
    *,
    value: str | None = None,
    package: str | None = None,
    version: str = "1.0",
    entry_points: str | None = None,
) -> None:
    """Put the module trackpl_<name> and the metadata of its distribution into `site`."""
    package = package or f"trackpl-{name}"
    site.mkdir(exist_ok=True, parents=True)
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    line = f"{name} = {value or f'{module}:Good'}"
    (info / "entry_points.txt").write_text(entry_points or f"[trackpl.methods]\n{line}\n")
