"""The structure: imports go down, files stay short, torch stays out of packages that need none."""

import ast
from pathlib import Path

import pytest

import diffx

ROOT = Path(diffx.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A package may import those below it. Packages on one line do not import each other.
LAYERS = [
    ["cli"],
    ["experiment"],
    ["report"],
    ["bench"],
    ["analysis"],
    ["quantization"],
    ["evaluation"],
    ["results"],
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
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
WITHOUT_TORCH = {"cli", "report", "results", "tracking", "console", "config", "files", "errors"}
OUTSIDE = {"__init__", "__main__"}  # the package itself, and the program


def package_of(path):
    first, *rest = path.relative_to(ROOT).parts
    return first if rest else path.stem


def imports(path):
    """Every module that a file imports, with whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module, node not in late
            if node.module == "diffx":
                yield from ((f"diffx.{alias.name}", node not in late) for alias in node.names)


def test_only_the_program_imports_the_package_itself():
    importers = {package_of(path) for path in FILES for name, _ in imports(path) if name == "diffx"}
    assert importers <= {"cli", "__main__"}, (
        "diffx/__init__.py has what users call, and stands on top"
    )


def test_every_package_is_in_the_list():
    assert {package_of(path) for path in FILES} - OUTSIDE <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    package = package_of(path)
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top != "diffx" or other not in LEVEL or package in OUTSIDE or other == package:
            continue
        assert LEVEL[other] > LEVEL[package], f"{package} imports {module}, which is not below it"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if package_of(path) in WITHOUT_TORCH],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_packages_without_torch(path):
    at_once = {module for module, at_once in imports(path) if at_once}
    assert not {
        module for module in at_once if module.partition(".")[0] in ("torch", "transformers")
    }
    if package_of(path) == "cli":  # no package before a command runs
        own = {"diffx", "diffx.__version__", "diffx.errors", "diffx.files", "diffx.cli.bench"}
        own |= {"diffx.cli.experiment"}
        assert {module for module in at_once if module.startswith("diffx")} <= own


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_library_stays_small():
    assert (
        sum(len(path.read_text(encoding="utf-8")) for path in FILES) <= 965_000
    )  # characters, whatever the line length
