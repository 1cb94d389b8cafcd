"""constraints.txt pins the dependencies for each Python version; the README uses it."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
LINES = [line for line in CONSTRAINTS if not line.startswith("#")]
PYTHONS = {"3.10": "3.10.13", "3.11": "3.11.7", "3.12": "3.12.1", "3.13": "3.13.0"}
LINUX = {
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
}


def declared():
    """pyproject.toml's lists of requirements, as one list: the library's, and every extra's."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    assert {
        "torch",
        "transformers",
        "pytest",
        "ruff",
        "math-verify",
        "hydra-submitit-launcher",
    } <= {r.name for r in requirements}
    return [requirement for requirement in requirements if requirement.name != "diffx"]


def pins(python):
    """The versions that apply to CPython ``python`` on Linux: for each name, all of them."""
    version = {
        "python_version": python,
        "python_full_version": PYTHONS[python],
        "implementation_version": PYTHONS[python],
    }
    environment = default_environment() | LINUX | version
    versions: dict[str, list[str]] = {}
    for requirement in map(Requirement, LINES):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            versions.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return versions


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_name_a_version_and_a_marker(line):
    requirement = Requirement(line)
    assert [specifier.operator for specifier in requirement.specifier] == ["=="]
    assert requirement.url is None and not requirement.extras
    assert re.fullmatch(
        r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ; [^#]+)?", line
    )  # no address, hash, local version or wildcard


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_pin_within_its_bounds(python):
    versions = pins(python)
    assert {name: several for name, several in versions.items() if len(several) > 1} == {}
    for requirement in declared():
        if requirement.name == "torch":
            continue
        (version,) = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} is pinned to {version}"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_a_torch_that_is_there_is_kept(python):
    # torch 2.6 needs sympy 1.13.1, torch 2.11 and 2.12 setuptools below 82;
    # torch itself pins the CUDA libraries.
    assert not {"torch", "sympy", "setuptools"} & pins(python).keys()
    assert not [name for name in pins(python) if name.startswith(("nvidia-", "cuda-"))]


def test_libraries_that_change_their_interfaces_have_upper_bounds():
    bounded = {
        r.name for r in declared() if any(specifier.operator == "<" for specifier in r.specifier)
    }
    assert {"torch", "transformers", "lm-eval", "wandb", "datasets", "torchao", "peft"} <= bounded
    (transformers,) = [
        requirement for requirement in declared() if requirement.name == "transformers"
    ]
    assert transformers.specifier.contains("5.23.0") and transformers.specifier.contains("5.24.0")


def test_the_readme_installs_with_the_constraints():
    commands = re.findall(
        r"^pip install .* && .*$",
        (REPOSITORY / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert commands == [
        "pip install -c constraints.txt -e . && diffx train",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
