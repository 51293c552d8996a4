"""Which code a result was measured with, and what has changed since.

    python benchmarks/provenance.py

gives results that have no stamp (merged from elsewhere, or older than stamps) that of the commit which first held them.

The code of a room (a folder of src/lbyl) is known by a hash of its syntax trees without docstrings, so that comments,
docstrings and formatting don't make a result look old.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "lbyl"
ROOMS = ("pipeline", "restore", "moments", "surgery", "selection", "graph", "runtime")
"""What every compression goes through; a benchmark may name others."""
RECORDED = (*ROOMS, "budget", "io/export", "io/onnx")


@dataclass(frozen=True)
class Stamp:
    """The state of the code when something was measured."""

    commit: str | None
    date: str
    sources: dict[str, str] = field(hash=False)

    @property
    def key(self) -> str:
        """A short name of these sources."""
        return hashlib.sha256(repr(sorted(self.sources.items())).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)


@cache
def current() -> Stamp:
    """The code as it is now. It is read once, for that is the code that a running benchmark has loaded."""
    return Stamp(head(), date.today().isoformat(), {room: digest(SOURCES / room) for room in RECORDED})


def head() -> str | None:
    """The commit, with a plus sign where files of src/ differ from it; None outside of a repository."""

    try:
        return git("rev-parse", "--short=9", "HEAD") + "+" * bool(git("status", "--porcelain", "--", str(SOURCES)))
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def digest(folder: Path) -> str:
    """A hash of the code of a folder, or of nothing where there is none."""
    return digest_of({str(file.relative_to(folder)): file.read_text("utf-8") for file in folder.rglob("*.py")})


def digest_of(files: dict[str, str]) -> str:
    """A hash of Python files, given by path; comments, docstrings and formatting do not count."""
    found = hashlib.sha256()
    for name, text in sorted(files.items()):
        for part in (name, *_tokens(ast.parse(text))):
            found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:12]


def _tokens(node: object) -> Iterator[str]:
    """A syntax tree as text that is the same in all versions of Python: empty fields differ, so they are left out."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [statement for statement in value if not _is_text(statement)]
            if value is None or value == [] or name in ("ctx", "kind", "type_comment"):
                continue
            yield name
            yield from _tokens(value)
    elif isinstance(node, list):
        for item in node:
            yield from _tokens(item)
        yield "."
    else:
        yield repr(node)


def _is_text(statement: ast.AST) -> bool:
    """Whether a statement is nothing but a string: a docstring, or what documents a constant."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def changed(before: Stamp, now: Stamp, rooms: Sequence[str]) -> list[str]:
    """Which of these rooms have other code now."""
    return [room for room in rooms if before.sources.get(room) != now.sources.get(room)]


def age(stamps: Iterable[Stamp | None], now: Stamp, rooms: Sequence[str]) -> str | None:
    """What a reader has to know of results with these stamps; None where all are of the code as it is now."""
    found = set(stamps)
    old = (stamp for stamp in found if stamp and changed(stamp, now, rooms))
    known = sorted(old, key=lambda stamp: (stamp.date, stamp.commit or ""))
    if not known and None not in found:
        return None
    parts = []
    if known:
        first, last = known[0], known[-1]
        when = f"between {named(first)} and {named(last)}" if first.date != last.date else f"on {named(last)}"
        since = [room for room in rooms if any(room in changed(stamp, now, rooms) for stamp in known)]
        what = "code of every step" if len(since) == len(rooms) else f"code in {', '.join(since)}"
        parts.append(f"measured {when}; since then {what} has changed")
    if None in found:
        parts.append("measured before the code was recorded with results")
    return "Older than the code: " + ", or ".join(parts) + "."


def named(stamp: Stamp) -> str:
    """Day and commit."""
    return stamp.date + (f" ({stamp.commit})" if stamp.commit else "")


@cache
def at(commit: str) -> Stamp:
    """The code of a commit."""
    files: dict[str, dict[str, str]] = {room: {} for room in RECORDED}
    for line in git("ls-tree", "-r", commit, "src/lbyl").splitlines():
        _, _, blob, path = line.split(None, 3)
        for room in RECORDED:
            folder = f"src/lbyl/{room}/"
            if path.startswith(folder) and path.endswith(".py"):
                files[room][path.removeprefix(folder)] = git("cat-file", "-p", blob)
    sources = {room: digest_of(found) for room, found in files.items()}
    return Stamp(git("rev-parse", "--short=9", commit), git("show", "-s", "--format=%cs", commit), sources)


def content(cell: dict[str, object]) -> str:
    """A measurement without its stamp, for comparison."""
    return json.dumps({key: value for key, value in cell.items() if key != "code"}, sort_keys=True)


def main() -> None:
    """Stamp what has no stamp."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        first: dict[str, str] = {}
        path = file.relative_to(ROOT).as_posix()
        for commit in git("log", "--reverse", "--diff-filter=AM", "--format=%H", "--", path).splitlines():
            for cell in json.loads(git("show", f"{commit}:{path}"))["measurements"]:
                first.setdefault(content(cell), commit)
        stamps = data.setdefault("code", {})
        for cell in data["measurements"]:
            if cell.get("code") not in stamps:
                commit = first.get(content(cell))
                cell["code"] = at(commit).key if commit else None
                if commit:
                    stamps[at(commit).key] = at(commit).to_dict()
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(file.stem, f"{sum(cell['code'] is None for cell in data['measurements'])} without a stamp")


if __name__ == "__main__":
    main()
