"""The command line, on top of the same functions that users call: one file a command.

Torch is imported inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from lbyl.cli.app import app

COMMANDS = ("inspect", "compress", "sweep", "show", "export", "bench")
"""Modules of this package, in the order in which help lists them; each adds its command to `app`."""

for _name in COMMANDS:
    importlib.import_module(f"lbyl.cli.{_name}")

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    # A console script does not search the working directory, where package.module:factory often lives.
    # Last, so that nothing there can shadow an installed package.
    sys.path.append(os.getcwd())
    app()
