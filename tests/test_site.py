"""The pages of the documentation in a real browser, opened as files: on a phone and on a desktop, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import SCHEMES, WIDTHS, browse, channels, contrast, in_browser
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = ("index", "how", "budgets", "results", "cli", "api", "files")
READING = ("--allow-file-access-from-files", "--disable-web-security", "--virtual-time-budget=20000")
MEASURE = """
const seen = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const style = (element, property) => view.getComputedStyle(element)[property];
  const title = page.querySelector("h1"), box = title.getBoundingClientRect();
  const shown = e => e !== null && e.getBoundingClientRect().width > 0 && style(e, "visibility") !== "hidden";
  return {
    width: view.innerWidth, scroll: root.scrollWidth, title: title.innerText, box: [box.left, box.right, box.height],
    ground: style(page.body, "backgroundColor"), ink: style(page.querySelector("article p"), "color"),
    size: style(page.querySelector("article p"), "fontSize"),
    search: [".md-search__input", "label[for=__search].md-header__button"].some(s => shown(page.querySelector(s))),
    drawn: [...page.querySelectorAll("article img")].every(e => e.naturalWidth > 0),
    wide: [...page.querySelectorAll("article img, article svg")].map(e => e.getBoundingClientRect().right),
  };
});
document.getElementById("seen").textContent = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a copy of what is there already if nothing is newer, else built here."""
    place, built = tmp_path_factory.mktemp("site"), ROOT / "build" / "site"
    sources = [ROOT / "mkdocs.yml", *(file for folder in ("docs", "src") for file in (ROOT / folder).rglob("*.*"))]
    newest = max(file.stat().st_mtime for file in sources if "__pycache__" not in file.parts)
    if (built / "index.html").is_file() and (built / "index.html").stat().st_mtime > newest:
        return Path(shutil.copytree(built, place, dirs_exist_ok=True))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(place)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    return place


@pytest.fixture(scope="module", params=SCHEMES)
def measured(request: pytest.FixtureRequest, site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What a browser makes of the pages in one color scheme: by page and by width."""
    places = [(page, name) for page in PAGES for name in WIDTHS]
    frames = "".join(
        f'<iframe style="border:0" width="{WIDTHS[name]}" height="900" src="{page}.html"></iframe>'
        for page, name in places
    )
    around = site / f"around_{request.param}.html"
    script = f"onload = () => setTimeout(() => {{{MEASURE}}}, 1000)"
    around.write_text(f'<!doctype html>{frames}<pre id="seen"></pre><script>{script}</script>', encoding="utf-8")
    dom = browse(tmp_path_factory.mktemp("measured"), around, request.param, "--dump-dom", *READING)
    (found,) = re.findall(r'<pre id="seen">(.+?)</pre>', dom, re.DOTALL)
    return request.param, dict(zip(places, json.loads(html.unescape(found)), strict=True))


@in_browser
def test_pages_fit_the_screen_and_have_a_title_and_search(measured: tuple[str, Any]) -> None:
    for (page, name), seen in measured[1].items():
        width = WIDTHS[name]
        assert seen["width"] == width, page
        assert seen["scroll"] <= width, page
        assert len(seen["title"]) > 2, page
        left, right, high = seen["box"]
        assert 0 <= left < right <= width, page
        assert high > 15, page
        assert seen["search"], page
        assert seen["drawn"], page
        assert all(right <= width for right in seen["wide"]), page


@in_browser
def test_text_stands_out_from_the_ground(measured: tuple[str, Any]) -> None:
    scheme, pages = measured
    for (page, _), seen in pages.items():
        assert (sum(channels(seen["ground"])) < 200) == (scheme == "dark"), page
        assert contrast(seen["ink"], seen["ground"]) > 7, page
        assert float(seen["size"].removesuffix("px")) >= 14, page


@in_browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_page_is_neither_blank_nor_cut_off(site: Path, tmp_path: Path, scheme: str, width: str) -> None:
    picture = tmp_path / "first.png"
    browse(tmp_path, site / "index.html", scheme, f"--window-size={WIDTHS[width]},1200", f"--screenshot={picture}")
    image = Image.open(picture).convert("RGB")
    assert image.width == WIDTHS[width]
    colors = sorted(image.getcolors(10**7), reverse=True)
    ground = colors[0][1]
    assert (max(ground) < 70) if scheme == "dark" else (min(ground) > 235)
    assert 0.2 < colors[0][0] / (image.width * image.height) < 0.97
