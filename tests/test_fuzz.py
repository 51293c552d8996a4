"""Folders that are damaged at random give one clear error each. `benchmarks/fuzz.py` damages thousands."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCUMENTS = 60


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    file = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
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
    before = fuzz.peak_memory()
    found = list(fuzz.run(DOCUMENTS, seed, templates))
    assert not [one for one in found if one.fault]
    assert len(found) == DOCUMENTS
    assert sum(one.outcome != "fine" for one in found) > DOCUMENTS / 2
    assert fuzz.peak_memory() - before < fuzz.MOST_MEMORY
