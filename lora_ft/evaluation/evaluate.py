"""The metrics of eval sets: of the model's probabilities and, if the run asks for them, of the texts it generates."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.metrics import add_set_name
from lora_ft.data.batches import UNSHARDED, Shard
from lora_ft.data.examples import Examples
from lora_ft.evaluation.references import EvalPrompts, eval_prompts
from lora_ft.evaluation.scoring import score
from lora_ft.evaluation.texts import generate_texts, text_metrics
from lora_ft.methods.interface import bare, virtual_ids
from lora_ft.nn.attention import Isolation


def evaluate_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    prompts: EvalPrompts | None,
    config: Config,
    isolation: Isolation,
    micro_batch_tokens: int,
    check: Callable[[], None] = lambda: None,
    shard: Shard = UNSHARDED,
    base: bool = False,
) -> tuple[dict, list[str]]:
    """One set's metrics by key, of the bare base if `base`, and the texts generated for `prompts` ([] if None); see `score`."""
    ids = [] if base else virtual_ids(model)
    with bare(model) if base else nullcontext():
        metrics = score(model, examples.with_prefix(ids).dataset, isolation, micro_batch_tokens, check, shard).metrics()
        if not prompts:
            return metrics, []
        texts = generate_texts(model, tokenizer, prompts.with_prefix(ids), config, check, shard)
    return metrics | text_metrics(config.generation.metrics, texts, prompts.references), texts


def evaluator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_sets: Mapping[str, Examples],
    config: Config,
    isolation: Isolation,
    micro_batch_tokens: int,
    shard: Shard,
) -> Callable[..., dict]:
    """The evaluation of a training run: a function that returns all sets' current metrics by the keys of the log.

    It takes an optional `check`, see `score`; with base=True it scores the base, in a model that was injected into but
    not trained: every method starts as its base.
    """
    prompts = {
        name: eval_prompts(model, tokenizer, examples, config) if config.train.predict_with_generate else None
        for name, examples in eval_sets.items()
    }

    def metrics(check: Callable[[], None] = lambda: None, base: bool = False) -> dict:
        result: dict = {}
        for name, examples in eval_sets.items():
            arguments = examples, prompts[name], config, isolation, micro_batch_tokens, check, shard, base
            result |= add_set_name(name, evaluate_set(model, tokenizer, *arguments)[0])
        return result

    return metrics
