"""The package runs on Linux, macOS and Windows: it names no POSIX call or place, and writes the same text everywhere.

Where `make test` runs on Windows, Pyright checks the same for the functions of modules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "lbyl"
FILES = sorted(PACKAGE.rglob("*.py"))

POSIX_MODULES = {"crypt", "curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {
        *(
            "chown",
            "chroot",
            "fchmod",
            "fchown",
            "fork",
            "forkpty",
            "getegid",
            "geteuid",
            "getgid",
            "getpgid",
            "getuid",
        ),
        *("killpg", "lchown", "mkfifo", "mknod", "nice", "O_DIRECTORY", "O_NOFOLLOW", "posix_fadvise", "pread"),
        *("pwrite", "sched_getaffinity", "setsid", "setuid", "statvfs", "sysconf", "uname", "wait", "WIFEXITED"),
    },
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"},
    "time": {"tzset"},
}
PLACES = ("/tmp", "/dev/", "/proc/", "/etc/", "/usr/", "/var/", "/home/", "/bin/")


def faults(source: str) -> Iterator[str]:
    """What does not work on every system, each with its line."""
    tree = ast.parse(source)
    guarded = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp | ast.If) and "sys.platform" in ast.unparse(node.test)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if line in guarded:
            continue
        for fault in (*_imported(node), *_named(node), *_placed(node), *_opened(node)):
            yield f"{line}: {fault}"


def _imported(node: ast.AST) -> Iterator[str]:
    found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        found = [str(node.module)]
        named = {alias.name for alias in node.names} & POSIX_NAMES.get(str(node.module), set())
        yield from (f"{node.module}.{name} is not on Windows" for name in named)
    yield from (f"the module {name} is not on Windows" for name in found if name.partition(".")[0] in POSIX_MODULES)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.attr in POSIX_NAMES.get(node.value.id, set()):
            yield f"{node.value.id}.{node.attr} is not on Windows"
        if node.value.id == "ctypes" and node.attr in ("CDLL", "cdll"):
            yield "a library of the system is loaded without asking for the system"


def _placed(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(PLACES):
        yield f"{node.value!r} is a place on POSIX systems"
    joined = isinstance(node, ast.JoinedStr) and any(
        isinstance(part, ast.FormattedValue) and _is_path(part.value) and _starts_with_slash(following)
        for part, following in zip(node.values, node.values[1:], strict=False)
    )
    if joined:
        yield "a path is joined by '/' in a text; join paths by Path"


def _is_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("path", "folder", "place", "file", "directory", "target")


def _starts_with_slash(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and str(node.value).startswith("/")


def _opened(node: ast.AST) -> Iterator[str]:
    """Text files without an encoding, or written with the line ends of the system."""
    if not isinstance(node, ast.Call):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = {keyword.arg for keyword in node.keywords}
    if name == "fdopen" or (name == "open" and not _is_opener(node.func)):
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        mode = next((mode for mode in map(str, modes) if set(mode) <= set("rwxabt+")), "r")
        text, written = "b" not in mode, bool(set(mode) & set("wxa+"))
    else:
        text, written = name in ("read_text", "write_text"), name == "write_text"
    if text and "encoding" not in given:
        yield f"{name} without an encoding"
    if text and written and "newline" not in given:
        yield f"{name} writes other line ends on Windows; pass newline"


def _is_opener(function: ast.expr) -> bool:
    """Whether a function called open is not the one of files."""
    return isinstance(function, ast.Attribute) and ast.unparse(function.value) in ("os", "Image", "format", "kind")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_file_works_on_every_system(file: Path) -> None:
    assert not list(faults(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("code", "fault"),
    {
        "import fcntl": "fcntl is not on Windows",
        "from os import fork": "os.fork is not on Windows",
        "os.getuid()": "os.getuid is not on Windows",
        "signal.signal(signal.SIGALRM, f)": "signal.SIGALRM is not on Windows",
        "ctypes.CDLL(None)": "without asking for the system",
        "Path('/tmp/x')": "'/tmp/x' is a place",
        "f'{folder}/{name}'": "joined by '/'",
        "open(file)": "open without an encoding",
        "file.open('w', encoding='utf-8')": "pass newline",
        "file.read_text()": "read_text without an encoding",
        "file.write_text('a', encoding='utf-8')": "pass newline",
    }.items(),
)
def test_a_fault_is_found(code: str, fault: str) -> None:
    assert [found for found in faults(code) if fault in found]


@pytest.mark.parametrize(
    "code",
    [
        "open(file, 'rb')",
        "file.open('wb')",
        "os.open(name, os.O_CREAT)",
        "ctypes.CDLL(None) if sys.platform == 'linux' else None",
        "file.write_text('a', encoding='utf-8', newline='\\n')",
        "f'{name}/{kind}'",
    ],
)
def test_what_works_everywhere_is_no_fault(code: str) -> None:
    assert not list(faults(code))
