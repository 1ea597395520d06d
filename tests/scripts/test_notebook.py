"""lora.ipynb runs from scratch with a small setting; its stored outputs are from one complete run."""

import copy
import json
import os
import re
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.tiny import write_base

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "lora.ipynb").read_text("utf-8")
STORED = nbformat.reads(TEXT, as_version=4)
CODE = [cell for cell in STORED.cells if cell.cell_type == "code"]


def write_reviews(folder: Path) -> Path:
    """Rows with the columns that scripts/assets.py writes."""
    folder.mkdir()
    for name in ("train", "eval"):
        rows = [
            {"review": f"the movie was {word} {n}", "rating": rating, "condition": "sad"}
            for n in range(4)
            for word, rating in (("great", "positive"), ("awful", "negative"))
        ]
        (folder / f"reviews_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> list:
    """The code cells after a run from scratch on a tiny model; `make notebook` runs them on the real one."""
    folder = tmp_path_factory.mktemp("notebook")
    model, data = write_base(folder / "base"), write_reviews(folder / "data")
    settings = {"LORA_NB_SMALL": "1", "LORA_NB_MODEL": str(model), "LORA_NB_DATA": str(data)}
    notebook = copy.deepcopy(STORED)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | settings)  # raises with the cell and its traceback
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_with_an_output_has_it_stored(executed):
    assert [bool(cell.outputs) for cell in CODE] == [bool(cell.outputs) for cell in executed]


def test_the_stored_run_is_complete_and_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [o for cell in CODE for o in cell.outputs if o.output_type == "error"]


def test_the_stored_run_names_no_local_paths_and_is_small():
    assert not re.findall(r"/(?:work|tmp|home|root|Users|opt|usr|var)/[^\"\\ ]*", TEXT)
    assert len(TEXT) < 400_000


def test_the_stored_run_took_less_than_ten_minutes():
    first, last = (CODE[i].metadata.execution[key] for i, key in ((0, "iopub.status.busy"), (-1, "iopub.status.idle")))
    assert (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds() < 600
