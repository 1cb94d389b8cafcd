"""The house holds: imports go down, files stay short, torch stays out of the rooms that need none."""

import ast
from pathlib import Path

import pytest

import diffx

ROOT = Path(diffx.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A room may import those below it. Rooms on one line are side by side and do not know each other.
ROOMS = [
    ["cli"],
    ["report"],
    ["bench"],
    ["analysis"],
    ["quantization"],
    ["evaluation"],
    ["export"],
    ["loading"],
    ["train"],
    ["dex"],
    ["data"],
    ["hub"],
    ["models"],
    ["ops"],
    ["tracking"],
    ["config"],
    ["console"],
    ["files"],
    ["errors"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
WITHOUT_TORCH = {"cli", "report", "tracking", "console", "config", "files", "errors"}
OUTSIDE = {"__init__", "__main__"}  # the package itself, and the program, which is the door


def room_of(path):
    first, *rest = path.relative_to(ROOT).parts
    return first if rest else path.stem


def imports(path):
    """Every module that a file imports, with whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module, node not in late
            if node.module == "diffx":
                yield from ((f"diffx.{alias.name}", node not in late) for alias in node.names)


def test_only_the_door_imports_the_package_itself():
    importers = {room_of(path) for path in FILES for name, _ in imports(path) if name == "diffx"}
    assert importers <= {"cli", "__main__"}, "diffx/__init__.py has what users call, and stands on top"


def test_every_room_is_in_the_list():
    assert {room_of(path) for path in FILES} - OUTSIDE <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top != "diffx" or other not in LEVEL or room in OUTSIDE or other == room:
            continue
        assert LEVEL[other] > LEVEL[room], f"{room} imports {module}, which is not below it"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in WITHOUT_TORCH], ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_without_torch(path):
    at_once = {module for module, at_once in imports(path) if at_once}
    assert not {module for module in at_once if module.partition(".")[0] in ("torch", "transformers")}
    if room_of(path) == "cli":  # no room before a command runs
        own = {"diffx", "diffx.__version__", "diffx.errors", "diffx.files", "diffx.cli.bench"}
        assert {module for module in at_once if module.startswith("diffx")} <= own


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_library_stays_small():
    assert sum(len(path.read_text(encoding="utf-8")) for path in FILES) <= 915_000  # characters, whatever the line length
