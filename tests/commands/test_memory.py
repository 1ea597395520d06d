"""The memory estimate against what torch really allocates, on tiny models of many families."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from lora_ft.commands.check.memory import Row, bytes_of, estimate, moments_of
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.model.quantize import quantize
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.rows import Segment
from tests.helpers.families import COMMON, FAMILIES, tiny_model

ROW = Row([Segment(24), Segment(16), Segment(8)], 30)


def shape_of(family):
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **(settings if "text_config" in settings else COMMON | settings))


def without_values(family, form=None):
    model = quantize(AutoModelForCausalLM.from_config(shape_of(family)), form)
    inject_lora(model)
    return model


class Allocated(TorchDispatchMode):
    """The oracle: the same step with values, its new storages counted."""

    def __init__(self, known):
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


def measured(model, isolation):
    keep_gate_and_up(model)
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in trainable(model).values())]
    counter = Allocated({t.untyped_storage().data_ptr() for t in held})
    ids = torch.randint(3, 90, (1, ROW.tokens))
    positions = torch.cat([torch.arange(s.length) for s in ROW.segments])[None]
    keep = torch.arange(ROW.supervised)
    with counter, isolation.row(model.train(), ROW.segments):
        supervised_loss(model, ids, positions, keep, ids[0, keep]).backward()
    return counter.peak


@pytest.mark.parametrize("form", [None, "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "gemma2", "opt"])
def test_a_step_without_values_makes_what_a_real_one_makes(family, form):
    model = quantize(tiny_model(family), form)
    inject_lora(model)
    isolation = Isolation.detect(model, 24)
    found = estimate(lambda: without_values(family, form), [ROW])
    real = measured(model, isolation)
    assert found.activations + found.logits == pytest.approx(real, rel=0.05)
    held = bytes_of([*model.parameters(), *model.buffers()]) - bytes_of([*trainable(model).values()])
    assert found.weights == pytest.approx(held, rel=0.02)
    assert (estimate(lambda: without_values(family, form), [ROW], runtime=1).heap > 0) == (form is None)
    assert found.adapter == found.optimizer == 8 * sum(p.numel() for p in trainable(model).values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_way_of_packing_is_foreseen(family):
    model = tiny_model(family)
    assert Isolation.guess_from_config(model, 32) == Isolation.detect(model, 32)


def test_checkpointing_needs_less_and_a_longer_row_more():
    plain, less = (estimate(lambda: without_values("llama"), [ROW], checkpointing=c, runtime=1) for c in (False, True))
    assert less.activations < plain.activations and less.weights == plain.weights
    assert less.heap >= plain.heap > 0  # what malloc's holes come from is made all the same
    longer = estimate(lambda: without_values("llama"), [ROW, Row([Segment(96)], 30)])
    assert longer.activations > 1.5 * plain.activations


def test_the_logits_of_a_row_are_those_of_a_chunk():
    few, many = (estimate(lambda: without_values("llama"), [Row([Segment(900)], n)]) for n in (300, 899))
    assert many.logits == few.logits


def test_a_model_whose_step_needs_values_is_told():
    def build():
        model = without_values("llama")
        model.register_forward_pre_hook(lambda model, _: bool(model.lm_head.weight.sum() > 0))  # as experts are chosen
        return model

    with pytest.raises(ModelError, match="without values"):
        estimate(build, [ROW])


@pytest.mark.parametrize("optimizer, moments", [("adamw_torch", 2), ("sgd", 0), ("rmsprop", 1)])
def test_the_optimizers_moments(tmp_path, optimizer, moments):
    assert moments_of(TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True)) == moments
