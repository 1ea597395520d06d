"""One thread, no network, no progress bars, and caches that belong to this test session alone."""

import gc
import os
import shutil
import tempfile

# Set before transformers and datasets are imported: they read these once. Commands run by tests inherit them.
CACHE = tempfile.mkdtemp(prefix="lora-ft-tests-")
os.environ.update(
    HF_HOME=CACHE,
    HF_HUB_CACHE=f"{CACHE}/hub",
    HF_DATASETS_CACHE=f"{CACHE}/datasets",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def bases_are_scored_in_each_run():
    """Else which test runs first would decide how many evaluations a run has."""
    from lora_ft.evaluation import kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "read_scores", lambda key: None)
        yield


def pytest_collection_finish():
    """All is imported, and stays: else every gc.collect() of a run would look through it, and in a fork copy it first."""
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)
