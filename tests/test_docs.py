"""What the documentation tells people to type does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lbyl
from lbyl.graph import rules

DOCS = Path(__file__).parent.parent / "docs"


def test_the_rule_in_extending_works_and_is_needed() -> None:
    rule, check = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Unfold(2), torch.nn.Conv1d(32, 5, 1)).eval()
    before = lbyl.inspect(net, torch.randn(1, 3, 6, 6)).graph.group("0")
    assert before.reason == "im2col in '1' has no rule"
    try:
        exec(rule, {})
        exec(check, {})
        with pytest.raises(ValueError, match="two rules for im2col"):
            exec(rule, {})
    finally:
        rules._RULES.pop("im2col", None)
