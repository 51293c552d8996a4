"""Folders that are damaged at random give one clear error each. `benchmarks/fuzz.py` damages thousands."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCUMENTS = 60


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    file = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location("fuzz", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def templates(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sound")
    fuzz.make_templates(place)
    fuzz.use_saved(place)
    return place


@pytest.mark.parametrize("seed", range(4))
def test_damaged_folders_give_clear_errors(seed: int, fuzz: ModuleType, templates: Path) -> None:
    found = list(fuzz.run(DOCUMENTS, seed, templates))
    assert not [one for one in found if one.fault]
    assert len(found) == DOCUMENTS
    assert sum(one.outcome != "fine" for one in found) > DOCUMENTS / 2


@pytest.mark.parametrize("name", ["plan and report, filled", "sweep, filled"])
def test_a_document_that_is_filled_up_takes_little_memory(
    name: str, fuzz: ModuleType, templates: Path, tmp_path: Path
) -> None:
    file, damage, *_ = fuzz.KINDS[name]
    shutil.copytree(templates, tmp_path / "here")
    (tmp_path / "here" / file).write_bytes(damage((templates / file).read_bytes(), random.Random(0)))
    # In a process of its own: what other tests have left in this one's memory would count as well.
    code = "import sys; from pathlib import Path; import fuzz; name, place = sys.argv[1:]; "
    code += "print(fuzz.used(name, 0, fuzz.KINDS[name][2], Path(place)).fault)"
    place = {"cwd": Path(str(fuzz.__file__)).parent, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code, name, str(tmp_path / "here")], **place)
    assert not done.stdout.strip()
