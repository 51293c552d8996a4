"""The report for people: what it says, that it needs nothing but itself, and how it looks in a real browser."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from browser import SCHEMES, WIDTHS, browse, channels, contrast, in_browser
from matplotlib.figure import Figure
from nets import HardCoded, compress, images, mlp, residual
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.artifact import DOCUMENT, PAGE, document, read_manifest
from lbyl.io.report.model_card import card
from lbyl.io.report.page import page, plot
from lbyl.io.report.words import expectation
from lbyl.runtime.bench import Bench, Change
from lbyl.runtime.forecast import Forecast
from lbyl.runtime.latency import Runs

HOSTILE = "</code><script>alert('x')</script>&\"<img src=//evil.test>$\\frac{1}"
X = images(2, 3, 8, 8)


class Consumer(HTMLParser):
    """Tags, attributes and text of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "hr", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def fitted() -> lbyl.Result:
    restore = lbyl.LeastSquares(moments=lbyl.Noise(images=4))
    return lbyl.compress(residual(), X, restore=restore, source="nets.py:residual", ratio=0.5)


def damaged(report: lbyl.Report, name: str) -> lbyl.Report:
    """The report with a text everywhere that texts of the user's can be."""
    rows = tuple(dataclasses.replace(row, group=f"{row.group}{name}", note=name) for row in report.rows)
    return dataclasses.replace(
        report, rows=rows, left=((name, name),), barriers=(name,), notes=(name,), seconds={name: 1.0}
    )


# -- what it says -------------------------------------------------------------------------------------------


def test_the_page_says_what_was_cut_what_it_cost_and_how_to_go_on(fitted: lbyl.Result) -> None:
    plan, report = fitted.plan, fitted.report
    consumer = Consumer(page(plan, report))
    before, after = report.parameters
    assert report.macs
    assert report.assessment
    assert consumer.open == []
    for words in (
        "Residual, pruned",
        "called with float32 2x3x8x8",
        f"{after:,}",
        f"{after / before:.1%} of {before:,}",
        f"{report.macs[1] / report.macs[0]:.1%} of ",
        f"{after * 4 / 1e3:,.1f} kB",
        expectation(report.forecast).headline,
        f"{report.assessment.restored:.1%}",
        f"{report.assessment.pruned:.1%} without restoration",
        "Verified in float64",
        f"lbyl {plan.library}",
        'lbyl.load("path/to/this/folder", fresh)',
        "load_source('nets.py:residual')",
        "moments=lbyl.Noise(images=4",
        "seed=0",
        *report.notes,
        *report.seconds,
    ):
        assert words in consumer.text
    for row in report.rows:
        cells = next(cells for cells in consumer.cells if cells[0] == row.group)
        assert cells[1:3] == [str(row.before), str(row.after)]
    for name, why in report.left:
        assert [name, why] in consumer.cells


def test_the_paper_s_errors_are_shown_where_they_apply() -> None:
    result = compress(residual(), X)
    consumer = Consumer(page(result.plan, result.report))
    assert "What was lost is not known." in consumer.text
    assert {"RE", "BE", "AE"} <= {cell for cells in consumer.cells for cell in cells}
    for row in result.report.rows:
        cells = next(cells for cells in consumer.cells if cells[0] == row.group)
        assert {f"{row.re:.3g}", f"{row.be:.3g}", f"{row.ae:.3g}"} <= set(cells)
    assert len([tag for tag in consumer.tags if tag == "svg"]) == 2


def test_without_any_error_only_the_widths_are_drawn() -> None:
    result = compress(residual(), X, restore="prune", verify=False)
    consumer = Consumer(page(result.plan, result.report))
    assert consumer.tags.count("svg") == (2 if any(row.re is not None for row in result.report.rows) else 1)
    assert "Not verified" in consumer.text


@pytest.mark.parametrize(("agreement", "tone"), [(0.97, "good"), (0.9, "fair"), (0.3, "bad"), (None, "none")])
def test_color_and_words_follow_the_forecast(fitted: lbyl.Result, agreement: float | None, tone: str) -> None:
    forecast = Forecast() if agreement is None else Forecast("agreement", agreement=agreement, low=0.1, high=1.0)
    consumer = Consumer(page(fitted.plan, dataclasses.replace(fitted.report, forecast=forecast)))
    assert ("class", f"verdict {tone}") in consumer.attributes
    assert expectation(forecast).headline in consumer.text
    assert "destroyed" not in consumer.text


# -- nothing but itself -------------------------------------------------------------------------------------


def test_names_of_the_user_s_are_text_and_nothing_else(fitted: lbyl.Result) -> None:
    plan = dataclasses.replace(fitted.plan, source=f"nets.py:{HOSTILE}", inputs=HOSTILE, library=HOSTILE)
    clean, hostile = page(fitted.plan, fitted.report), page(plan, damaged(fitted.report, HOSTILE))
    consumer = Consumer(hostile)
    assert {"script", "img"}.isdisjoint(consumer.tags)
    assert set(consumer.tags) - set(Consumer(clean).tags) <= {"ul", "li"}
    assert consumer.text.count("alert('x')") > 6
    assert consumer.open == []


@pytest.mark.parametrize("name", ["层.权重", "a\nb\tc", "\x00\x07", "🙂" * 40, "$x", "", "x" * 500, "%s{{7*7}}"])
def test_odd_names_are_no_error(fitted: lbyl.Result, name: str) -> None:
    text = page(fitted.plan, damaged(fitted.report, name))
    assert Consumer(text).open == []
    assert "49" not in Consumer(text).text or "{{7*7}}" not in name


def test_the_page_asks_nothing_of_the_network(fitted: lbyl.Result) -> None:
    text = page(fitted.plan, fitted.report)
    consumer = Consumer(text)
    assert {"script", "link", "img", "iframe", "object", "base"}.isdisjoint(consumer.tags)
    assert "http" not in re.sub(r'http-equiv="', "", text)
    assert not re.search(r"url\((?!#)|@import", text)
    policy = dict(consumer.attributes)["content"] and [v for n, v in consumer.attributes if "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for name, value in consumer.attributes:
        if name in ("href", "src"):
            assert value.startswith("#")


def test_ids_are_unique_and_what_refers_to_them_finds_them(fitted: lbyl.Result) -> None:
    consumer = Consumer(page(fitted.plan, fitted.report))
    ids = [value for name, value in consumer.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in consumer.attributes if name == "href"}
    targets |= {found for _, value in consumer.attributes for found in re.findall(r"url\(#(.*?)\)", value)}
    assert targets
    assert targets <= set(ids)


def test_the_pictures_take_the_page_s_colors(fitted: lbyl.Result) -> None:
    text = page(fitted.plan, fitted.report)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id|href|clip-path)="[^"]*"', "", drawing))
        assert {"var(--ink)", "var(--before)", "var(--after)"} <= set(re.findall(r"var\(--\w+\)", drawing))
    assert "@media (prefers-color-scheme: dark)" in text


def test_equal_reports_give_equal_bytes_whatever_the_style(fitted: lbyl.Result) -> None:
    first = page(fitted.plan, fitted.report)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "svg.hashsalt": "x"}):
        before = dict(mpl.rcParams)
        assert page(fitted.plan, fitted.report) == first
        assert dict(mpl.rcParams) == before


def test_another_process_writes_the_same_bytes(tmp_path: Path, fitted: lbyl.Result) -> None:
    folder = fitted.save(tmp_path / "small")
    code = (
        "import sys; from lbyl.io.artifact import read_manifest; from lbyl.io.report.page import page; "
        "m = read_manifest(sys.argv[1]); sys.stdout.buffer.write(page(m.plan, m.report).encode()); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, check=True)
    assert done.stdout == (folder / PAGE).read_bytes()


@pytest.mark.parametrize("count", [0, 1, 41, 1500])
def test_any_number_of_groups_has_a_page_of_sensible_size(fitted: lbyl.Result, count: int) -> None:
    row = fitted.report.rows[0]
    rows = tuple(dataclasses.replace(row, group=f"encoder.layer.{index}") for index in range(count))
    text = page(fitted.plan, dataclasses.replace(fitted.report, rows=rows))
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawing)[0])
        assert height < 800
        assert drawing.count("<text") < 60
    assert len(text) < 50_000 + 1200 * count
    assert all(f"encoder.layer.{index}<" in text for index in range(count))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e30])
def test_numbers_that_can_t_be_drawn_are_no_error(fitted: lbyl.Result, value: float) -> None:
    rows = tuple(dataclasses.replace(row, errors=(value, value)) for row in fitted.report.rows)
    report = dataclasses.replace(fitted.report, rows=rows, parameters=(0, 0), macs=(0, 0), seconds={"trace": 0.0})
    assert Consumer(page(fitted.plan, report)).open == []


# -- beside the weights -------------------------------------------------------------------------------------


def test_the_folder_holds_the_page_and_the_document(tmp_path: Path, fitted: lbyl.Result) -> None:
    folder = fitted.save(tmp_path / "small")
    manifest = read_manifest(folder)
    assert (folder / PAGE).read_text(encoding="utf-8") == page(manifest.plan, manifest.report)
    found = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(document(".", manifest.plan, manifest.report)))
    assert found.keys() == {"path", "load", "plan", "report"}
    assert found["plan"]["settings"]["restore"]["name"] == "LeastSquares"
    assert "lbyl.load('.'" in found["load"]


def test_the_command_prints_what_the_file_holds(tmp_path: Path) -> None:
    factory = tmp_path / "factory.py"
    factory.write_text(f"import sys; sys.path.append({os.path.dirname(__file__)!r}); from nets import residual")
    out = tmp_path / "small"
    options = ["--input", "2x3x8x8", "--restore", "prune", "-o", str(out)]
    printed = json.loads(command("compress", f"{factory}:residual", *options, "--json").stdout)
    saved = json.loads((out / DOCUMENT).read_text(encoding="utf-8"))
    for key in ("path", "load"):  # a file does not know where its folder will be moved
        assert printed.pop(key).replace(str(out), ".") == saved.pop(key)
    assert printed == saved
    shown = command("show", str(out)).stdout
    assert str(out / PAGE) in shown.replace("\n", "")
    (out / PAGE).unlink()
    assert PAGE not in command("show", str(out)).stdout


def command(*arguments: str) -> Any:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


def test_loading_needs_neither(tmp_path: Path, fitted: lbyl.Result) -> None:
    folder = fitted.save(tmp_path / "small")
    (folder / PAGE).unlink()
    (folder / DOCUMENT).unlink()
    assert lbyl.load(folder, residual())(X).equal(fitted.model(X))


def test_importing_the_library_imports_neither_matplotlib_nor_jinja() -> None:
    code = (
        "import sys, lbyl.surgery.plan, lbyl.io.artifact, lbyl.cli; "
        "assert not {'matplotlib', 'jinja2'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- notebooks ----------------------------------------------------------------------------------------------


def test_notebooks_show_results_reports_and_inspections(fitted: lbyl.Result) -> None:
    result, report = (Consumer(shown._repr_html_()) for shown in (fitted, fitted.report))
    for consumer in (result, report):
        assert consumer.open == []
        assert {"html", "body", "script"}.isdisjoint(consumer.tags)
        assert fitted.report.rows[0].group in consumer.text
    assert result.tags.count("svg") == 1
    assert "svg" not in report.tags
    assert "How to load it" in result.text
    assert "How to load it" not in report.text

    inspection = lbyl.inspect(HardCoded(), images(2, 6))
    consumer = Consumer(inspection._repr_html_())
    for group in inspection.graph.groups:
        cells = next(cells for cells in consumer.cells if cells[0] == group.name)
        assert cells[1] == str(group.width)
    hostile = dataclasses.replace(inspection, untraced=((HOSTILE, HOSTILE),), note=HOSTILE)
    assert {"script", "img"}.isdisjoint(Consumer(hostile._repr_html_()).tags)


def test_the_style_sheet_rules_only_what_is_lbyl_s(fitted: lbyl.Result) -> None:
    style = re.findall(r"<style>(.*?)</style>", fitted._repr_html_(), re.DOTALL)
    assert len(style) == 1
    rules = re.findall(r"([^{}]+)\{[^}]*\}", re.sub(r"/\*.*?\*/", "", style[0], flags=re.DOTALL))
    assert rules
    assert all(part.strip().startswith(".lbyl") for rule in rules for part in rule.split(","))


def test_plot_gives_a_figure_without_touching_pyplot(fitted: lbyl.Result, tmp_path: Path) -> None:
    figure = fitted.plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [row.group for row in fitted.report.rows]
    figure.savefig(tmp_path / "plot.png")
    assert len({color for _, color in Image.open(tmp_path / "plot.png").getcolors(10**6)}) > 3
    assert len(plot(compress(mlp(6, 8), images(2, 6), restore="prune").report).axes) >= 1


# -- in a real browser --------------------------------------------------------------------------------------

MEASURE = """
const seen = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const style = (element, property) => frame.contentWindow.getComputedStyle(element)[property];
  const boxes = selector => [...page.querySelectorAll(selector)].map(e => e.getBoundingClientRect());
  return {
    width: root.clientWidth, scroll: root.scrollWidth, text: page.body.innerText,
    ground: style(page.body, "backgroundColor"), ink: style(page.querySelector("main"), "color"),
    muted: style(page.querySelector(".muted"), "color"),
    letters: style(page.querySelector("svg text"), "fill"), size: style(page.querySelector("td"), "fontSize"),
    svgs: boxes("svg").map(b => [b.left, b.right, b.width, b.height]),
    labels: boxes("svg text").map(b => [b.left, b.right, b.height]),
    bars: [...page.querySelectorAll("svg path")].map(e => style(e, "fill")),
  };
});
document.getElementById("seen").textContent = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, fitted: lbyl.Result) -> Path:
    """A report with names that are too long for a phone."""
    rows = tuple(
        dataclasses.replace(row, group=f"backbone.{row.group}.with_a_name_that_no_phone_can_show_on_one_line")
        for row in fitted.report.rows
    )
    notes = (*fitted.report.notes, "unbroken" * 30)
    file = tmp_path_factory.mktemp("page") / PAGE
    file.write_text(page(fitted.plan, dataclasses.replace(fitted.report, rows=rows, notes=notes)), encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=SCHEMES)
def measured(request: pytest.FixtureRequest, file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What a browser makes of the page, at the width of a phone and of a desktop, in one color scheme."""
    folder = tmp_path_factory.mktemp("measured")
    text = html.escape(file.read_text("utf-8"))
    frames = "".join(
        f'<iframe style="border:0" width="{width}" height="900" srcdoc="{text}"></iframe>' for width in WIDTHS.values()
    )
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html>{frames}<pre id="seen"></pre><script>onload = () => {{{MEASURE}}}</script>', encoding="utf-8"
    )
    dom = browse(folder, around, request.param, "--dump-dom")
    found = re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    return request.param, dict(zip(WIDTHS, json.loads(html.unescape(found[0])), strict=True))


@in_browser
def test_nothing_is_wider_than_the_screen(measured: tuple[str, Any]) -> None:
    for name, width in WIDTHS.items():
        seen = measured[1][name]
        assert seen["width"] == width
        assert seen["scroll"] <= width
        assert len(seen["svgs"]) == 1
        for left, right, wide, high in seen["svgs"]:
            assert 0 <= left < right <= width
            assert wide > 300
            assert high > 80
        for left, right, high in seen["labels"]:
            assert -1 <= left < right <= width + 1
            assert high > 8  # can be read
        assert float(seen["size"].removesuffix("px")) >= 12


@in_browser
def test_a_browser_shows_the_words(measured: tuple[str, Any], fitted: lbyl.Result) -> None:
    for seen in measured[1].values():
        for words in ("Residual, pruned", "What was cut", "How to load it", "How to make it again", "Output error"):
            assert words in seen["text"]
        assert fitted.report.rows[0].group in seen["text"]


@in_browser
def test_letters_and_bars_stand_out_from_the_ground(measured: tuple[str, Any]) -> None:
    scheme, widths = measured
    for seen in widths.values():
        assert (sum(channels(seen["ground"])) < 150) == (scheme == "dark")
        assert contrast(seen["ink"], seen["ground"]) > 7
        assert contrast(seen["muted"], seen["ground"]) > 4.5
        assert contrast(seen["letters"], seen["ground"]) > 7
        strong = [color for color in seen["bars"] if color != "none" and contrast(color, seen["ground"]) > 3]
        assert strong


@in_browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_is_neither_blank_nor_cut_off(file: Path, tmp_path: Path, scheme: str, width: str) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, file, scheme, f"--window-size={WIDTHS[width]},1600", f"--screenshot={picture}")
    image = Image.open(picture).convert("RGB")
    assert image.width == WIDTHS[width]
    ground = image.getpixel((1, 1))
    assert isinstance(ground, tuple)
    assert (max(ground) < 60) if scheme == "dark" else (min(ground) > 235)
    colors = sorted(image.getcolors(10**7), reverse=True)
    assert 0.2 < colors[0][0] / (image.width * image.height) < 0.98
    assert sum(count for count, (red, _, blue) in colors if blue - red > 60) > 500  # what is left is blue
    margin = image.crop((image.width - 4, 0, image.width, image.height))
    assert margin.getcolors() == [(4 * image.height, ground)]


def test_a_measured_latency_is_in_summary_file_and_page(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(4, 8)
    before, after = Runs((0.004, 0.004, 0.004)), Runs((0.003, 0.003, 0.003))
    slow = Change("0", "Linear", Runs((0.001,) * 3), Runs((0.001,) * 3), (100, 50))
    whole = Change("whole", "Sequential", before, after, (200, 100))
    found = Bench(whole, (slow,), Change("", "", Runs((0.0,) * 3), Runs((0.0,) * 3), (0, 0)), "cpu", 2, 3)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune").timed(found)
    assert "latency: 4 ms → 3 ms (75% ± 0%) on cpu with 2 threads, 3 runs of each in turns" in result.report.summary()
    folder = result.save(tmp_path / "out")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "3 ms" in text
    assert "Cut, but not faster: 0 (MACs 50%, time 100%)" in text
    assert read_manifest(folder).report.latency == result.report.latency


def test_names_are_no_markdown_in_the_card(fitted: lbyl.Result) -> None:
    rows = (replace(fitted.report.rows[0], group="a`b|c"), *fitted.report.rows[1:])
    report = replace(fitted.report, rows=rows, left=(("``", "<img src=x>"),), notes=("[a](b)\n# *c* \x1b[2J",))
    text = card(replace(fitted.plan, source="net.py:`x`", network=""), report)
    assert "| ``a`b\\|c`` |" in text
    assert "- ``` `` ```: \\<img src=x\\>" in text
    assert "\nNote: \\[a\\](b) \\# \\*c\\* \\\\x1b\\[2J\n" in text
    assert "# \\`x\\`, pruned" in text
