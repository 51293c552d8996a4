"""`lbyl show`."""

from __future__ import annotations

from rich.text import Text

from lbyl.cli.app import app, out, print_json, working
from lbyl.cli.options import Folder, Json
from lbyl.cli.sources import setting


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Print what a saved folder holds: settings, groups, totals, and how to load it."""
    with working(f"reading {folder}"):
        from lbyl.io.artifact import PAGE, document, read_manifest
        from lbyl.io.report.snippets import load_line

        manifest = read_manifest(folder)
    plan = manifest.plan
    if as_json:
        print_json(document(folder, plan, manifest.report))
        return
    out.print(Text(f"{plan.source or 'a model of unknown source'} on {plan.inputs}, by lbyl {plan.library}"))
    out.print(Text(", ".join(f"{name}={setting(value)}" for name, value in plan.settings.items())))
    out.print(manifest.report)
    if (folder / PAGE).is_file():
        out.print(Text(f"{folder / PAGE} shows it with pictures"), soft_wrap=True)
    out.print(Text(f"load it with\n\n    {load_line(folder, plan.source)}\n"), soft_wrap=True)
