"""The metrics of eval sets: of the model's probabilities and, if the run asks for them, of the texts it generates."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.metrics import add_set_name
from lora_ft.data.batches import UNSHARDED, RowPacking, Shard
from lora_ft.data.examples import Examples
from lora_ft.evaluation.kept import base_scores
from lora_ft.evaluation.paired import Rows, compare_rows
from lora_ft.evaluation.references import EvalPrompts, eval_prompts
from lora_ft.evaluation.scoring import Compute, confusion_of, macro_f1, score
from lora_ft.evaluation.telling_rows import telling_rows
from lora_ft.evaluation.texts import bleu_of, generate_texts, text_metrics
from lora_ft.methods.interface import bare, virtual_ids
from lora_ft.nn.attention import Isolation


def evaluate_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    prompts: EvalPrompts | None,
    config: Config,
    isolation: Isolation,
    packing: RowPacking,
    check: Callable[[], None] = lambda: None,
    shard: Shard = UNSHARDED,
    base: bool = False,
    compute: Compute | None = None,
) -> tuple[dict, list[str], Rows]:
    """One set's metrics, of the bare base if `base`, texts generated for `prompts` ([] if None), and rows. See `score`."""
    ids = [] if base else virtual_ids(model)
    with bare(model) if base else nullcontext():
        scores = score(model, examples.with_prefix(ids).dataset, isolation, packing, check, shard, compute)
        if not prompts:
            return scores.metrics(), [], scores.rows
        texts = generate_texts(model, tokenizer, prompts.with_prefix(ids), config, check, shard)
    metrics, rows = text_metrics(config.generation.metrics, texts, prompts.references)
    return scores.metrics() | metrics, texts, scores.rows | rows


def compare_with_base(base: Rows, own: Rows) -> dict[str, dict]:
    """Each metric's difference from the base on the same rows, see `compare_rows`."""
    return compare_rows(base, own, {"macro_f1": _macro_f1_of, "bleu": bleu_of})


def _macro_f1_of(rows: np.ndarray) -> float:
    return macro_f1(confusion_of(rows, 1 + int(rows.max())))


class Evaluator:
    """The evaluation of a training run; called, it returns all sets' current metrics by the keys of the log.

    The call takes an optional `check`, see `score`; with base=True it scores the base, in a model that was injected into but
    not trained: every method starts as its base. base_rows: eval set -> the base's rows, with which later calls compare.
    base_was_kept: whether its scores were those of an earlier run. fingerprint: of the base. compute: see `score`; the base is
    always scored alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eval_sets: Mapping[str, Examples],
        config: Config,
        isolation: Isolation,
        packing: RowPacking,
        shard: Shard,
        fingerprint: str,
        compute: Compute | None = None,
    ):
        self.fingerprint, self.compute = fingerprint, compute
        self.model, self.tokenizer, self.eval_sets, self.config = model, tokenizer, eval_sets, config
        self.isolation, self.packing, self.shard = isolation, packing, shard
        self.base_rows: dict[str, Rows] = {}
        self.base_was_kept = False
        self.prompts = {
            name: eval_prompts(model, tokenizer, examples, config) if config.train.predict_with_generate else None
            for name, examples in eval_sets.items()
        }

    def __call__(self, check: Callable[[], None] = lambda: None, base: bool = False) -> dict:
        result: dict = {}
        how = self.config, self.isolation, self.packing, check, self.shard, base, None if base else self.compute
        self.base_was_kept = base
        for name, examples in self.eval_sets.items():
            compute = partial(evaluate_set, self.model, self.tokenizer, examples, self.prompts[name], *how)
            if base:
                texts = self.prompts[name] is not None
                (metrics, _, rows), kept = base_scores(self.fingerprint, examples, self.config, texts, compute)
                self.base_rows[name], self.base_was_kept = rows, self.base_was_kept and kept
            else:
                metrics, _, rows = compute()
                of_base = self.base_rows.get(name, {})
                metrics |= compare_with_base(of_base, rows) | telling_rows(of_base, rows)
            result |= add_set_name(name, metrics)
        return result
