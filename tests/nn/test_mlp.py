"""The gated MLP that keeps gate and up alone, against the model's own forward and plain autograd."""

import copy

import pytest
import torch
from torch import nn

from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.nn.mlp import keep_gate_and_up
from tests.helpers.families import tiny_model

IDS = torch.arange(3, 24)[None]
GATED = ["llama", "qwen3", "gemma2", "olmo2"]


class Kept:
    """Elements of the storages that autograd keeps, parameters aside."""

    def __init__(self, model):
        self.known, self.elements = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        return self.hooks.__enter__()

    def __exit__(self, *error):
        return self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.elements += storage.nbytes() // tensor.element_size()
        return tensor


def step(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("targets", [["q", "v"], ["all"]])
@pytest.mark.parametrize("family", GATED)
def test_loss_and_gradients_are_the_models_own_to_the_bit(family, targets):
    model = tiny_model(family)
    inject_lora(model, targets, dropout=0.25, seed=0)
    for i, p in enumerate(trainable(model).values()):
        nn.init.normal_(p.data, 0, 0.1, generator=torch.Generator().manual_seed(i))
    model.train()
    kept = copy.deepcopy(model)
    assert keep_gate_and_up(kept) == model.config.num_hidden_layers
    assert keep_gate_and_up(kept) == 0  # done once
    torch.manual_seed(0)
    loss, gradients = step(model)
    torch.manual_seed(0)
    again, same = step(kept)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name


class MLP(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32)
        self.act = nn.SiLU()
        self.requires_grad_(False)
        self.w2.requires_grad_(trained)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("trained", [False, True])
def test_gate_and_up_are_all_that_is_kept(trained):
    mlp, x = MLP(trained), torch.randn(1, 5, 8, requires_grad=True)
    usual, ours = Kept(mlp), Kept(mlp)
    with usual:
        mlp(x)
    keep_gate_and_up(mlp)
    with ours:
        mlp(x)
    assert usual.elements == (4 if trained else 3) * 5 * 32
    assert ours.elements == 2 * 5 * 32  # what `down` keeps is the hook's own matter: a shape


def scaled(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x) * 2)


def by_value(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) if x.sum() > 0 else x


def same_branch(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(self.w1(x)))


@pytest.mark.parametrize("forward", [scaled, by_value, same_branch])
def test_an_mlp_of_another_form_is_left_alone(forward):
    other = type("Other", (MLP,), {"forward": forward})
    assert keep_gate_and_up(other(trained=False)) == 0


def test_a_forward_that_someone_else_replaced_is_left_alone():
    mlp = MLP(trained=False)
    mlp.forward = lambda x: x
    assert keep_gate_and_up(mlp) == 0
