"""Shows the documentation where the public names of lbyl are, which are imported when they are first asked for."""

from __future__ import annotations

from typing import Any

import griffe

from lbyl._public import HOME


class PublicNames(griffe.Extension):
    """Makes every public name a member of the package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Add an alias for each name."""
        if pkg.name == "lbyl":
            for name, module in HOME.items():
                pkg.set_member(name, griffe.Alias(name, f"{module}.{name}"))
