"""One thread, no network, no progress bars, and caches that belong to this test session alone."""

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

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)
