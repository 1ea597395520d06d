"""An eval set's metrics: of the model's probabilities, and of what it writes where it is asked to."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.load import Config
from lora_ft.core.metrics import add_set_name
from lora_ft.data.batches import UNSHARDED, Shard
from lora_ft.data.examples import Examples
from lora_ft.evaluation.references import Questions
from lora_ft.evaluation.scoring import score
from lora_ft.evaluation.texts import questions_for, text_metrics, write
from lora_ft.methods.interface import bare, virtual_ids
from lora_ft.nn.attention import Isolation


def evaluate_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    asked: Questions | None,
    config: Config,
    isolation: Isolation,
    micro_batch_tokens: int,
    check: Callable[[], None] = lambda: None,
    shard: Shard = UNSHARDED,
) -> tuple[dict, list[str]]:
    """The metrics of one set, and what the model wrote after the prompts in `asked` (nothing if it is None)."""
    metrics = score(model, examples.dataset, isolation, micro_batch_tokens, check, shard).metrics()
    texts = write(model, tokenizer, asked, config, check, shard) if asked else []
    if asked:
        metrics |= text_metrics(config.generation.metrics, texts, asked.references)
    return metrics, texts


def evaluator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_sets: Mapping[str, Examples],
    config: Config,
    isolation: Isolation,
    micro_batch_tokens: int,
    shard: Shard,
) -> Callable[..., dict]:
    """A function for training's evaluations: the metrics of all sets now, by name (lora_ft/metric_names.py).

    It takes a `check` as `score` does, or nothing; with `base` it scores the base, of a model that has only been injected
    into (all methods start as their base, but for virtual tokens, which the base isn't given).
    """
    asked = {
        name: questions_for(model, tokenizer, examples, config) if config.train.predict_with_generate else None
        for name, examples in eval_sets.items()
    }
    prefix = virtual_ids(model)
    adapted = {
        name: (examples.with_prefix(prefix), prompts and prompts.with_prefix(prefix))
        for (name, examples), prompts in zip(eval_sets.items(), asked.values(), strict=True)
    }

    def metrics(check: Callable[[], None] = lambda: None, base: bool = False) -> dict:
        found: dict = {}
        with bare(model) if base else nullcontext():
            for name, examples in eval_sets.items():
                read, prompts = (examples, asked[name]) if base else adapted[name]
                its, _ = evaluate_set(
                    model, tokenizer, read, prompts, config, isolation, micro_batch_tokens, check, shard
                )
                found |= add_set_name(name, its)
        return found

    return metrics
