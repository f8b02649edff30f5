"""Whether `trackpl fit` would take some options, without starting anything."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import set_parsing_settings

from trackpl import arguments, logs, training


class _Reader(training.CLI):
    """Reads the options and stops there."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check(options: Sequence[str]) -> None:
    """Read the options as `trackpl fit` does.

    Raises:
        Error: what `trackpl fit` would say of them.
    """
    logs.quiet()
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=arguments.allowed_packages(),
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )
    _Reader("fit", arguments.read("fit", list(options)))
