"""Onto what an adapter is merged that was trained on a quantized base: the weights it was trained on, or the original ones."""

import gc
from typing import Literal

from rich.table import Table
from transformers import PreTrainedModel

from lora_ft.commands.check import display
from lora_ft.config.load import NOT_TRAINING, parse_config
from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError, UserError
from lora_ft.core.messages import first_line, info, working
from lora_ft.data.batches import RowPacking
from lora_ft.data.examples import Examples
from lora_ft.data.prepare import prepare_eval_sets
from lora_ft.evaluation.evaluate import evaluate_set
from lora_ft.methods.lora import method as lora
from lora_ft.methods.lora.verify import merged_and_rounded, merging
from lora_ft.methods.trained import Trained, run_settings
from lora_ft.model.device import micro_batch_tokens, prepare_device
from lora_ft.model.files import Base
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.model.stored import stored_dtype
from lora_ft.nn.attention import Isolation
from lora_ft.nn.forms import Form

OntoName = Literal["quantized", "original"]
MOST_EXAMPLES = 256  # that a choice is made by


def form_to_merge_onto(trained: Trained, base: Base, onto: OntoName | None) -> Form | None:
    """The form of the base to merge onto, None for the original weights.

    By default that whose loss on the run's eval data is lower; without the data, that of the training. Raises ConfigError if
    there is no choice.
    """
    form = trained.quantization
    if form is None:
        if onto == "quantized":
            raise ConfigError(f"--onto quantized: {trained.folder} was trained on a base that was not quantized.")
        return None
    if onto is None:
        onto = _by_loss(trained, base, form)
    if onto == "original":
        info(
            f"note: trained on the base in {form}, merged onto the original weights: another function than was trained"
        )
        return None
    return form


def _by_loss(trained: Trained, base: Base, form: Form) -> OntoName:
    """What has the lower loss on the run's eval data, whose losses are printed."""
    if trained.record["base"].get("fingerprint") != base.fingerprint:  # which the merge refuses, or warns of
        return _as_trained(form, "the run's was of another base")
    settings = run_settings(trained.folder, trained.record)
    try:
        config = parse_config(settings, NOT_TRAINING) if settings else None
        if config is None or config.data.eval is None:
            return _as_trained(form, "the run has none")
        most = min(config.data.max_eval_examples or MOST_EXAMPLES, MOST_EXAMPLES)
        data = config.data.model_copy(update={"max_eval_examples": most})
        examples = next(iter(prepare_eval_sets(data, load_tokenizer(base), config.train.seed).values()))
    except UserError as e:
        return _as_trained(form, first_line(e))
    with working(f"comparing what to merge onto, by {len(examples.dataset):,} examples"):
        losses = _losses(trained, config, base, form, examples)
    table = Table(
        "", "loss", title=f"on {len(examples.dataset):,} examples of the run's eval data", box=None, pad_edge=False
    )
    for name, value in losses.items():
        table.add_row(name, f"{value:.4f}")
    display.console().print(table)
    quantized, original = [*losses.values()][2:]
    onto: OntoName = "quantized" if quantized <= original else "original"
    info(f"merged --onto {onto}, whose loss is lower")
    return onto


def _as_trained(form: Form, why: str) -> OntoName:
    """The choice that needs no data, and a note of why it is made."""
    info(f"note: no eval data at hand to compare by ({why}): merged onto the {form} weights it was trained on")
    return "quantized"


def _losses(trained: Trained, config: Config, base: Base, form: Form, examples: Examples) -> dict[str, float]:
    """The losses of the base, of the adapter on it as it was trained, and of both merged models."""
    tokenizer, device = load_tokenizer(base), prepare_device(config.trainer.use_cpu)

    def loaded(quantization: Form | None) -> PreTrainedModel:
        model = load_base(base, config.model.dtype, device, quantization)
        lora.load(model, trained)
        return model

    def loss(model: PreTrainedModel, base: bool = False) -> float:
        isolation = Isolation.detect(model, examples.report.longest)
        at_most = micro_batch_tokens(config.train.micro_batch_tokens, device)
        packing = RowPacking.of(model, isolation, at_most, config.train.share_prefixes == "auto")
        return evaluate_set(model, tokenizer, examples, None, config, isolation, packing, base=base)[0]["loss"]

    model = loaded(form)
    losses = {f"base, in {form}": loss(model, base=True), "with the adapter, as trained": loss(model)}
    with merged_and_rounded(model, dict.fromkeys(merging(model), stored_dtype(base))):
        losses["merged --onto quantized"] = loss(model)
    del model
    gc.collect()
    return losses | {"merged --onto original, another function": loss(loaded(None))}
