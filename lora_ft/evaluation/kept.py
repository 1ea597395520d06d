"""Scores that need not be computed again: those of a base, in the cache; those of a run's adapter, in its record.

What they depend on is compared: the weights, the encoded examples, the settings of generation and the packages' versions.
The machine, its threads and the dtype that it chose change them by rounding only, which is no reason to compute them again.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import pyarrow as pa

from lora_ft.config.schema import Config
from lora_ft.core.errors import FilesError
from lora_ft.core.metrics import split_set_name
from lora_ft.core.version import __version__
from lora_ft.data.cache import cached, cached_table, key_of
from lora_ft.data.examples import Examples
from lora_ft.distributed import processes
from lora_ft.evaluation.paired import Rows
from lora_ft.evaluation.telling_rows import KEY
from lora_ft.methods.trained import Trained
from lora_ft.model.files import Base

Scored = tuple[dict, list[str], Rows]  # metrics, generated texts, and what each row adds to the metrics
VERSIONS = {"lora_ft": __version__, **{name: version(name) for name in ("torch", "transformers", "tokenizers")}}
ROWS = pa.schema({"metric": pa.string(), "numbers": pa.int32(), "values": pa.list_(pa.float64())})


def base_scores(
    fingerprint: str,
    examples: Examples,
    config: Config,
    texts: bool,
    compute: Callable[[], Scored],
    again: bool = False,
) -> tuple[Scored, bool]:
    """The scores of a base on one eval set, and whether they were kept; else they are computed, and kept from now on.

    texts: whether texts are generated. again: compute them in any case.
    """
    data = config.data.model_dump(mode="json", exclude={"train", "eval"})
    writing = [config.train.seed, config.generation.model_dump(mode="json")] if texts else None
    key = key_of("base scores", fingerprint, _encoded(examples), data, *_form(config), writing, VERSIONS)
    kept = None if again else processes.broadcast(lambda: read_scores(key))
    if kept:
        return kept, True
    scored = compute()
    if processes.is_main():
        with suppress(FilesError):  # no room in the cache: the next run computes them
            _keep(key, scored)
    return scored, False


def _form(config: Config) -> tuple[str | None, ...]:
    """In which form a base's weights are used."""
    return config.model.dtype, config.model.quantization


def _encoded(examples: Examples) -> str:
    """SHA-256 of the examples themselves, whichever file they are from and whichever seed has chosen them."""
    digest = hashlib.sha256()
    columns = [name for name in examples.dataset.column_names if name != "where"]
    for batch in examples.dataset.select_columns(columns).with_format(None).iter(1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()


def _content(report: dict) -> dict:
    """What of an encoding's report does not depend on where its files are."""
    return {key: value for key, value in report.items() if key not in ("files", "texts")}


def read_scores(key: str) -> Scored | None:
    """What was kept under a key, if it is still there."""
    if (found := cached_table(key)) is None:
        return None
    table, facts = found
    rows = {r["metric"]: np.array(r["values"]).reshape(-1, r["numbers"]) for r in table}
    return facts["metrics"], facts["texts"], rows


def _keep(key: str, scored: Scored) -> None:
    metrics, texts, rows = scored

    def write_all(write: Callable[[list[tuple]], None]) -> dict:
        write([(metric, values.shape[1], values.ravel().tolist()) for metric, values in rows.items()])
        return {"metrics": metrics, "texts": texts}

    cached(key, ROWS, write_all, "the scores of")


def recorded_scores(
    trained: Trained, config: Config, files: Base, name: str, examples: Examples
) -> dict[str, dict] | None:
    """The scores of "base" and "adapter" (or "model", of method full) on an eval set as the run's record has them.

    None if they may be others now, or if it lacks some. The folder's files were verified when it was opened.
    """
    record, own = trained.record, trained.config
    then, versions = (record.get("data") or {}).get("eval") or {}, record.get("versions") or {}
    if (
        own is None
        or _content((then.get(name) or {}) if name else then) != _content(asdict(examples.report))
        or versions | VERSIONS != versions
    ):
        return None
    texts_then = own.generation if own.train.predict_with_generate else None
    texts_now = config.generation if config.generation.metrics else None
    if (record.get("base") or {}).get("fingerprint") != files.fingerprint:
        return None
    if (texts_then, own.train.seed, _form(own)) != (texts_now, config.train.seed, _form(config)):
        return None
    parts = {"base": "base_metrics", "model" if trained.method == "full" else "adapter": "metrics"}
    scores = {
        who: split_set_name(record.get(part), [name] if name else []).get(name, {}) for who, part in parts.items()
    }
    if not all("loss" in metrics for metrics in scores.values()):
        return None
    return {who: {key: value for key, value in metrics.items() if key != KEY} for who, metrics in scores.items()}
