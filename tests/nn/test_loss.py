"""The loss in chunks equals the loss at once, gradients too, with every family's own head."""

import pytest
import torch

from lora_ft.methods.lora.inject import inject_lora, lora_layers, trainable
from lora_ft.nn import loss
from lora_ft.nn.attention import Isolation
from lora_ft.nn.rows import flat_row
from tests.helpers.families import FAMILIES, tiny_model, token_ids

EXAMPLES = [token_ids(1, n, seed=n)[0].tolist() for n in (9, 14, 4)]
KEEP = torch.tensor([1, 2, 5, 7, 9, 12, 20, 21, 24, 25])


def gradients(model) -> tuple[float, list[torch.Tensor]]:
    row = flat_row(EXAMPLES)
    targets = row.input_ids[0][KEEP + 1]
    with Isolation.detect(model, 64).row(model, row.segments):
        total = loss.supervised_loss(model, **row.inputs, keep=KEEP, targets=targets)
        return total.item(), list(torch.autograd.grad(total * 0.3, list(trainable(model).values())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_chunks_equal_the_whole(family, head, monkeypatch):
    model = tiny_model(family)
    name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    inject_lora(model, ["q"], rank=2, seed=0, modules=[name] if head else [])
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            torch.nn.init.normal_(B, std=0.3)
    whole, wanted = gradients(model)
    monkeypatch.setattr(loss, "CHUNK", 3)
    chunked, got = gradients(model)
    assert chunked == pytest.approx(whole, rel=1e-5)
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-4, atol=1e-6 + 1e-5 * w.abs().max())


@pytest.mark.parametrize(("tokens", "size"), [(200, 200), (600, 256), (1600, 400), (8192, 512)])
def test_logits_of_a_quarter_of_the_tokens_within_bounds(tokens, size):
    assert max(map(len, loss.chunks(torch.empty(tokens, 1)))) == size


@torch.no_grad()
def test_nothing_is_kept_without_gradients(monkeypatch):
    model = tiny_model("llama")
    row = flat_row(EXAMPLES)
    whole = loss.supervised_loss(model, **row.inputs, keep=KEEP, targets=row.input_ids[0][KEEP + 1])
    monkeypatch.setattr(loss, "CHUNK", 4)
    assert loss.supervised_loss(model, **row.inputs, keep=KEEP, targets=row.input_ids[0][KEEP + 1]) == pytest.approx(
        whole
    )
