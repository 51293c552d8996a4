"""What MkDocs does to the pages besides rendering them: four small steps, all of them offline."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError

import lbyl

_CLI = "<!-- cli -->"
_OUTSIDE = re.compile(r"(?<!!)\[(`?)([^\[\]`]+)\1\]\(\.\./[^)\s]*\)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:class|func|meth):<code>([\w.]+)</code>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the command line's reference; turn links that leave the pages into ones to the API, or into text."""
    if "/" in page.file.src_uri:  # from a tutorial, ../ leads to the pages
        return markdown
    return _OUTSIDE.sub(_inside, markdown.replace(_CLI, _commands()) if _CLI in markdown else markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, and the roles of docstrings into links."""
    return _ROLE.sub(_reference, _MATH.sub(_formula, content))


def _commands() -> str:
    """The commands as Typer documents them."""
    call = [sys.executable, "-m", "typer", "lbyl.cli", "utils", "docs", "--name", "lbyl"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode or "\n## " not in done.stdout:
        raise PluginError(f"{' '.join(call)} failed: {done.stderr}")
    return done.stdout.partition("\n## ")[2].join(("## ", ""))


def _inside(link: re.Match[str]) -> str:
    quote, text = link.groups()
    return f"[{quote}{text}{quote}][lbyl.{text}]" if text in lbyl.__all__ else f"{quote}{text}{quote}"


def _formula(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    display = "block" if bracket == "[" else "inline"
    made = latex2mathml.converter.convert(html.unescape(latex).strip(), display=display)
    return f'<{tag} class="arithmatex">{made}</{tag}>'


def _reference(role: re.Match[str]) -> str:
    return f'<autoref identifier="{role[1]}" optional><code>{role[1]}</code></autoref>'
