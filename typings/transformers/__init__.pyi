# The benchmarks call a few of its thousands of names. To bind all of them takes half of the time of a type check.
from typing import Any

def __getattr__(name: str) -> Any: ...
