"""The ranges of pyproject.toml against the versions that `make test`, `test-newest` and `test-oldest` install."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges(*extras: str) -> dict[str, Requirement]:
    """The requirements of the project and of some extras, by name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    return {name: requirement for name, requirement in found.items() if name != PROJECT["name"]}


def pins(file: str) -> dict[str, Version]:
    lines = [re.split("[=>]=", line) for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in lines}


def test_every_dependency_has_a_newest_version_within_its_range():
    newest, newer = pins("constraints.txt"), pins("constraints-newest.txt")
    for name, requirement in ranges("generation", "nf4", "serve", "test", "templates", "dev", "docs", "bench").items():
        assert newest[name] in requirement.specifier, name
        assert newer.get(name, newest[name]) in requirement.specifier, name
    assert not {name for name, version in newer.items() if version <= newest[name]}


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges():
    oldest = pins("constraints-oldest.txt")
    lower = {
        name: Version(s.version)
        for name, r in ranges("generation", "nf4", "serve", "test").items()
        for s in r.specifier
        if ">=" in str(s)
    }
    assert oldest.pop("torch") >= lower.pop("torch")  # see the file
    assert oldest == lower
