"""The files around the code agree with each other: versions, citation, changelog, workflows, issue templates."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

import lbyl
from lbyl.surgery.versions import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pythons() -> list[str]:
    """The versions that the classifiers name."""
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    return [found[1] for name in PROJECT["classifiers"] if (found := re.fullmatch(pattern, name))]


def released() -> list[tuple[str, date]]:
    """The releases of the changelog, the latest one first."""
    found = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", read("CHANGELOG.md"), re.MULTILINE)
    return [(version, date.fromisoformat(day)) for version, day in found]


def test_the_python_versions_agree() -> None:
    least = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert least
    found = [int(version.partition(".")[2]) for version in pythons()]
    assert found == list(range(int(least[1]), found[-1] + 1))
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{least[1]}"
    assert PYPROJECT["tool"]["pyright"]["pythonVersion"] == f"3.{least[1]}"
    assert f"sys.version_info < (3, {least[1]})" in read("Makefile")


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    text = read("CHANGELOG.md")
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    unreleased = [head for head in heads if head == "[Unreleased]"]
    assert heads == [*unreleased, *(f"[{version}] - {day}" for version, day in released())]
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
    versions = [tuple(map(int, version.split("."))) for version, _ in released()]
    assert versions == sorted(versions, reverse=True)
    assert [day for _, day in released()] == sorted((day for _, day in released()), reverse=True)


def test_the_version_is_the_changelog_s_latest() -> None:
    assert released()[0][0] == PROJECT["version"]


def test_the_citation_is_valid_and_of_this_version() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert (str(citation["version"]), citation["date-released"]) == released()[0]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    paper = citation["references"][0]
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    readme = read("README.md")
    for text in (names, paper["title"], paper["journal"], str(paper["year"])):
        assert f"= {{{text}}}" in readme


def test_what_is_stable_names_the_versions_that_there_are() -> None:
    page = read("docs/stability.md")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [str(number + 1) for number in range(VERSION)]
    assert f"Python {pythons()[0]} to {pythons()[-1]}" in page
    with pytest.raises(lbyl.ArtifactError) as caught:
        lbyl.Plan.from_dict({"version": VERSION + 1})
    assert f"```text\n{caught.value}\n```" in page


def test_every_workflow_is_valid() -> None:
    assert {file.name for file in WORKFLOWS} == {"docs.yml", "release.yml", "test.yml"}
    for file in WORKFLOWS:
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert workflow["name"]
        assert workflow[True]  # "on" is a boolean in YAML 1.1
        assert workflow["permissions"]["contents"] == "read"
        for job in workflow["jobs"].values():
            assert job["runs-on"]
            assert job["timeout-minutes"] <= 60
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@\S+", step["uses"])


def test_the_workflow_tests_every_system_and_python() -> None:
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == pythons()
    assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}
    assert not matrix.keys() - {"python", "system"}  # no combination is left out
    assert "make test" in [step.get("run") for step in job["steps"]]
    assert read(".ci/run").rstrip().endswith("make test")


@pytest.mark.parametrize("template", ["fault.yml", "network.yml"])
def test_an_issue_template_is_valid(template: str) -> None:
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{template}"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert all(item["type"] in ("textarea", "input", "dropdown", "checkboxes") for item in fields)
    assert len({item["id"] for item in fields}) == len(fields)
    assert all(item["attributes"]["label"] for item in fields)
