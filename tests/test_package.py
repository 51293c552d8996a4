"""What `pip install lbyl` gets: sdist and wheel are built and checked, and the wheel works by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]

EXAMPLE = """
import torch, torchvision
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def small(*args, **kwargs):
    torch.manual_seed(0)
    return Small().eval()

torch.set_num_threads(1)
torchvision.models.resnet50 = torchvision.models.get_model = small  # nothing is downloaded
"""


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist, and with the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def fresh(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel. It sees the packages around it, but not the checkout's lbyl."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", "--no-index", wheel)
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=clean()).strip()
    # A folder named in a .pth file is only a place to look in: editable installations in it do not count.
    outer = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (Path(place) / "outer.pth").write_text(outer, encoding="utf-8", newline="\n")
    return programs


def clean() -> dict[str, str]:
    """The environment without what would make Python find the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_sdist_and_wheel_are_what_an_index_takes(built: Path) -> None:
    names = sorted(file.name for file in built.iterdir())
    assert names == [f"lbyl-{VERSION}-py3-none-any.whl", f"lbyl-{VERSION}.tar.gz"]
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        metadata = HeaderParser().parsestr(content.read(f"lbyl-{VERSION}.dist-info/METADATA").decode())
    here = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src" / "lbyl").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if not name.startswith(f"lbyl-{VERSION}.dist-info/")} == here
    assert {"lbyl/py.typed", "lbyl/moments/images/SOURCES.md", "lbyl/moments/texts/sentences.txt"} <= names
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        tops = {name.split("/")[1] for name in content.getnames() if "/" in name}
    assert {"src", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= tops
    assert not tops & {"tests", "benchmarks", ".venv", "build"}


def test_the_version_is_known(fresh: Path, tmp_path: Path) -> None:
    assert run(fresh / "lbyl", "--version", cwd=tmp_path, env=clean()) == f"lbyl {VERSION}\n"
    code = "import lbyl; print(lbyl.__version__, lbyl.__file__)"
    version, file = run(fresh / "python", "-c", code, cwd=tmp_path, env=clean()).split(maxsplit=1)
    assert version == VERSION
    assert Path(file.strip()).is_relative_to(fresh.parent)


def test_the_short_example_of_the_readme_runs(fresh: Path, tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert "lbyl.compress" in example
    code = EXAMPLE + example.replace("224, 224", "12, 12") + "\nlbyl.load('smaller/')(image)\n"
    said = run(fresh / "python", "-c", code, cwd=tmp_path, env=clean())
    assert said.startswith("Expected to give the same answer"), said
    assert {"lbyl.json", "model.safetensors", "report.html"} <= {file.name for file in (tmp_path / "smaller").iterdir()}
