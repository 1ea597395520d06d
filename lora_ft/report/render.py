"""Rendering the templates in pages/, and writing what they give. The results have no script and make no request."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lora_ft.core import run_folder
from lora_ft.core.errors import FilesError
from lora_ft.core.messages import escape_controls, redact
from lora_ft.core.storage import write_file
from lora_ft.core.version import __version__
from lora_ft.report import charts

# more marks above or below one letter than any language has: they would be drawn over the lines around it
_MARK = "[\\u0300-\\u036f\\u1ab0-\\u1aff\\u1dc0-\\u1dff\\u20d0-\\u20ff\\ufe20-\\ufe2f]"
MARKS = re.compile(f"({_MARK}{{6}}){_MARK}+")


def render(template: str, **values: Any) -> str:
    """A template of pages/ with these values, all of which are escaped."""
    return _environment().get_template(template).render(**values)


@cache  # with the templates that it has compiled
def _environment() -> jinja2.Environment:
    pages, strict = jinja2.PackageLoader("lora_ft.report", "pages"), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=pages,
        autoescape=True,
        undefined=strict,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.globals |= {"version": __version__, "plot": charts}
    return environment


def _harmless(value: Any) -> Any:
    """A text for a page, without characters that reverse or cover the text around them; a macro's output is such already."""
    return MARKS.sub("\\1\u2026", escape_controls(redact(value))) if type(value) is str else value


def write_page(path: Path, content: str) -> None:
    """Write a page or drawing. Raises FilesError if another tool's file has that name, or if it can't be written."""
    if path.exists() and not run_folder.is_own_report(path):
        raise FilesError(f"{path}: exists and is not from lora-ft. Move it, or give another name: --output FILE.")
    write_file(path, content)
