"""The command line. Each command has its own file and calls the functions that users call in Python.

Torch is imported inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from lbyl.cli.app import app
from lbyl.cli.terminal import run

COMMANDS = ("inspect", "compress", "sweep", "resize", "show", "export", "bench")
"""Modules of this package, in the order of the help. Each adds its command to `app`."""

for _name in COMMANDS:
    importlib.import_module(f"lbyl.cli.{_name}")

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    # A console script does not search the working directory, where package.module:factory often lives.
    # At the end of the path, so that it can't shadow an installed package.
    try:
        sys.path.append(os.getcwd())
    except OSError:
        sys.exit("error: the working folder no longer exists; change to another folder")
    run(app)
