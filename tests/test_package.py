"""The wheel: it holds the package with its pages, and works without the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_ft.core.version import __version__

ROOT = Path(__file__).parents[1]


def pip(folder: Path, *arguments: str) -> str:
    """What pip prints, in a folder; it must end well."""
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has, so that nothing of an earlier build is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] in ("lora_ft", "pyproject.toml", "README.md", "LICENSE"):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip(folder, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", "./source")
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    listed = subprocess.run(["git", "ls-files", "lora_ft"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(listed.splitlines())


def test_it_works_without_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    pip(tmp_path, "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert run(str(site / "bin/lora-ft"), "--version").strip() == f"lora-ft {__version__}"
    assert run("-c", "import lora_ft; print(lora_ft.__file__)").strip() == str(site / "lora_ft/__init__.py")
    assert "train" in run("-m", "lora_ft", "--help") and '"$schema"' in run("-m", "lora_ft", "schema")
    loaded = "import jinja2; l = jinja2.PackageLoader('lora_ft.report', 'pages'); print(l.list_templates())"
    assert "page.html" in run("-c", loaded)


@pytest.mark.parametrize("extra", ["", "[generation,nf4,serve]"])
def test_pip_resolves_it_with_and_without_its_extra(wheel, extra):
    """Every requirement exists and fits the versions that are installed here; an extra that it lacks is only a warning."""
    said = pip(wheel.parent, "install", "--dry-run", "--no-index", f"{wheel}{extra}")
    assert "does not provide the extra" not in said
    assert ("rouge" in said) == bool(extra)
