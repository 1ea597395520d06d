"""The architecture: which package may import which, without circles; small files; a light command line."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_ft
from tests.helpers.tiny import python

ROOT = Path(lora_ft.__file__).parent
# A package imports packages of the lines before its own. Inside a package imports have no circles.
FLOORS = [
    "core nn",
    "config model",
    "data methods distributed",
    "evaluation training report",
    "commands",
    "cli",
]
HEIGHT = {package: height for height, packages in enumerate(FLOORS) for package in packages.split()}
MODULES = {  # by name below lora_ft; a package, by its own name, is its __init__
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """The modules of lora_ft that a module imports, anywhere in its file; "" is lora_ft itself."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix("lora_ft.") in MODULES else node.module for name in full}
    return {name.removeprefix("lora_ft").lstrip(".") for name in names if name.split(".")[0] == "lora_ft"} - {module}


def test_the_package_root_has_the_packages_and_nothing_else():
    entries = {path.name for path in ROOT.iterdir()} - {"__pycache__"}
    assert entries == {*HEIGHT, "__init__.py", "__main__.py"}


def test_imports_point_down():
    arrows = {(module, name) for module in MODULES.keys() - {"__init__", "__main__"} for name in imports(module)}
    packages = {arrow: tuple(name.split(".")[0] for name in arrow) for arrow in arrows}
    wrong = {
        arrow
        for arrow, (package, imported) in packages.items()
        if package != imported and HEIGHT.get(imported, len(FLOORS)) >= HEIGHT[package]
    }
    assert not wrong


def test_imports_have_no_circle():
    list(TopologicalSorter({module: imports(module) for module in MODULES}).static_order())  # raises CycleError


def test_files_stay_below_250_lines():
    assert not {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > 250}


@pytest.mark.parametrize("package", ["core", "config", "report", "cli"])
def test_light_packages_import_no_torch(package):
    names = [f"lora_ft.{name}" for name in MODULES if name.split(".")[0] == package]
    assert imported_by(*names) & {"torch", "transformers", "datasets"} == set()


def test_training_imports_nothing_unneeded():
    """What torch, transformers and datasets import themselves cannot be helped; nothing else of weight is imported."""
    unneeded = {
        "sklearn",
        "scipy",
        "matplotlib",
        "tensorboard",
        "tensorflow",
        "torchvision",
        "trl",
        "sacrebleu",
        "gguf",
    }
    assert imported_by("lora_ft.commands.train") & unneeded == set()


def imported_by(*modules: str) -> set[str]:
    """All modules in a new process after it imported these."""
    return set(python(f"import sys, {', '.join(modules)}\nprint(*sys.modules)").split())
