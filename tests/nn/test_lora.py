"""The LoRA layer against plain autograd and the paper's formula."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ft.nn import adapted, lora
from lora_ft.nn.dropout import InputDropout
from lora_ft.nn.lora import ALL_ROWS, LoRALinear, RowBlocks
from lora_ft.nn.scaling import scaling

IN, OUT, RANK = 10, 24, 3
PARTS = {
    "whole": None,
    "thirds, q and v": {"q": RowBlocks(1, 24, 0, 8), "v": RowBlocks(1, 24, 16, 8)},
    "thirds, all": {"q": RowBlocks(1, 24, 0, 8), "k": RowBlocks(1, 24, 8, 8), "v": RowBlocks(1, 24, 16, 8)},
    "heads, q and v": {"q": RowBlocks(4, 6, 0, 2), "v": RowBlocks(4, 6, 4, 2)},
    "kv heads": {"q": RowBlocks(2, 12, 0, 6), "k": RowBlocks(2, 12, 6, 3), "v": RowBlocks(2, 12, 9, 3)},
    "not sorted by name": {"q": RowBlocks(4, 6, 0, 2), "v": RowBlocks(4, 6, 2, 2), "k": RowBlocks(4, 6, 4, 2)},
}
SHAPES = {"2-D": (7, IN), "3-D": (2, 5, IN), "4-D": (2, 3, 2, IN), "one row": (1, IN)}


def build(parts=None, *, conv=False, bias=True, dtype=torch.float32, seed=0, alpha=5.0) -> LoRALinear:
    """A layer with random W, b, A, B."""
    g = torch.Generator().manual_seed(seed)
    base = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=bias)
    for parameter in base.parameters():
        parameter.data.normal_(generator=g)
    layer = LoRALinear(base.to(dtype), RANK, scaling(RANK, alpha), parts)
    layer.start(g)
    for B in layer.lora_B.values():
        B.data.normal_(generator=g)
    return layer


def to_double(layer: LoRALinear) -> LoRALinear:
    return copy.deepcopy(layer).double()


def row_indices(rows: RowBlocks) -> Tensor:
    return torch.cat([torch.arange(b * rows.width + rows.start, b * rows.width + rows.start + rows.length)
                      for b in range(rows.blocks)])  # fmt: skip


def formula(layer: LoRALinear, x: Tensor, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    """h = W x + b + s B A (m x / (1 - p)), with plain operations only, in x's dtype."""
    W = layer.weight.to(x.dtype)
    b = None if layer.bias is None else layer.bias.to(x.dtype)
    y = F.linear(x, W.T if isinstance(layer.base, Conv1D) else W, b)
    dropped = x if keep is None else x * keep / (1 - p)
    for part, rows in layer.rows.items():
        A, B = layer.lora_A[part].to(x.dtype), layer.lora_B[part].to(x.dtype)
        update = layer.scaling * (dropped @ A.T) @ B.T
        y = y + torch.zeros_like(y).index_copy(-1, row_indices(rows), update)
    return y


def gradients(layer: LoRALinear, y: Tensor, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.requires_grad:
        wanted["x"] = x
    found = torch.autograd.grad((y * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def random(*shape, seed=1, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fixed_mask(monkeypatch, keep: Tensor):
    monkeypatch.setattr(InputDropout, "mask", lambda self, x: keep.view(x.shape))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_plain_autograd(parts, conv, shape, dropout, monkeypatch):
    layer = to_double(build(PARTS[parts], conv=conv))
    x = random(*SHAPES[shape]).requires_grad_()
    keep = random(*SHAPES[shape], seed=2) > 0 if dropout else None
    if dropout:
        layer.dropout = InputDropout(dropout)
        fixed_mask(monkeypatch, keep)
    y, expected = layer(x), formula(layer, x, keep, dropout)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weights = random(*y.shape, seed=3)
    assert_close(gradients(layer, y, x, weights), gradients(layer, expected, x, weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parts", ["whole", "heads, q and v"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(parts, dropout, monkeypatch):
    layer = to_double(build(PARTS[parts]))
    x = random(2, 3, IN).requires_grad_()
    if dropout:
        layer.dropout = InputDropout(dropout)
        fixed_mask(monkeypatch, random(2, 3, IN, seed=2) > 0)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["transposed", "strided", "expanded", "columns first"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_inputs_that_are_not_contiguous(view, bias, dropout):
    layer = to_double(build(PARTS["heads, q and v"], bias=bias))
    leaf = random(3, 4, IN).requires_grad_()
    x, keep = view(leaf), None
    if dropout:  # two readers: the first mask is there to be looked at
        layer.dropout = InputDropout(dropout)
        layer.dropout.readers = 2
        keep = layer.dropout.mask(x)
    y, expected = layer(x), formula(layer, x, keep, dropout)
    torch.testing.assert_close(y, expected)
    weights = random(*y.shape, seed=3)
    got, wanted = gradients(layer, y, leaf, weights), gradients(layer, expected, leaf, weights)
    assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_may_be_changed_in_place(bias):
    layer = to_double(build(bias=bias))  # as Falcon does: mlp_output += attention_output
    x = random(2, 3, IN).requires_grad_()
    other = random(2, 3, OUT, seed=5).requires_grad_()
    y = layer(x)
    y += other * other
    expected = formula(layer, x) + other * other
    torch.testing.assert_close(y, expected)
    weights = random(*y.shape, seed=3)
    assert_close(gradients(layer, y, x, weights), gradients(layer, expected, x, weights), rtol=1e-9, atol=1e-9)


def test_gradients_that_are_not_contiguous():
    layer = to_double(build(PARTS["kv heads"]))
    x = random(2, 3, IN).requires_grad_()
    got = torch.autograd.grad(layer(x).transpose(0, 1).sum(), x)
    expected = torch.autograd.grad(formula(layer, x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_an_input_without_gradient_gets_none():
    layer = to_double(build())
    x = random(4, IN)
    weights = random(4, OUT, seed=3)
    expected = gradients(layer, formula(layer, x), x, weights)
    assert_close(gradients(layer, layer(x), x, weights), expected, rtol=1e-9, atol=1e-9)


def test_the_base_gets_no_gradient():
    layer = build()
    layer(random(4, IN, dtype=torch.float32)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A.all", "lora_B.all"}


def test_a_second_backward_through_a_retained_graph_is_the_same():
    layer = to_double(build(PARTS["thirds, all"]))
    x = random(4, IN).requires_grad_()
    y = layer(x).square().sum()
    first = torch.autograd.grad(y, [x, *layer.lora_A.values()], retain_graph=True)
    second = torch.autograd.grad(y, [x, *layer.lora_A.values()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    layer = to_double(build())
    x = random(4, IN).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("parts", ["whole", "heads, q and v"])
def test_a_bfloat16_base_with_a_float32_adapter(parts):
    layer = build(PARTS[parts], dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    x = random(64, IN, dtype=torch.bfloat16).requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = x.detach().float().requires_grad_()
    expected = formula(layer, exact)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    weights = random(64, OUT, seed=3, dtype=torch.bfloat16)
    got = gradients(layer, y, x, weights)
    wanted = gradients(layer, expected, exact, weights.float())
    assert {name: g.dtype for name, g in got.items()} == {
        name: torch.bfloat16 if name == "x" else torch.float32 for name in got
    }
    for name, g in got.items():
        assert (g.float() - wanted[name]).norm() < 1e-2 * wanted[name].norm(), name


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients():
    layer = build()
    x = random(64, IN, dtype=torch.float32).requires_grad_()
    weights = random(64, OUT, seed=3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    got, wanted = gradients(layer, y, x, weights), gradients(layer, formula(layer, x), x, weights)
    for name, g in got.items():
        assert g.dtype == torch.float32
        assert (g - wanted[name]).norm() < 1e-2 * wanted[name].norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_masks(reentrant):
    q, k = build(seed=1), build(seed=2)
    shared = InputDropout(0.5)
    q.dropout = k.dropout = shared
    shared.readers = 2
    x = random(6, IN, dtype=torch.float32).requires_grad_()

    def block(x):
        x = torch.tanh(x)
        return (q(x) * k(x)).sum()

    def run(call):
        torch.manual_seed(5)
        parameters = [*q.lora_A.values(), *q.lora_B.values(), *k.lora_A.values(), *k.lora_B.values()]
        for p in (*parameters, x):
            p.grad = None
        y = call(x)
        y.backward()
        return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in parameters)]

    plain = run(block)
    again = run(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_dropout_is_off_in_eval_mode_and_in_the_base():
    layer = build()
    layer.dropout = InputDropout(0.5)
    layer.dropout.readers = 1
    x = random(50, IN, dtype=torch.float32)
    plain = layer.eval()(x)
    torch.testing.assert_close(plain, formula(layer, x))
    layer.train()
    assert not torch.equal(layer(x), plain)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


def test_dropout_keeps_the_expectation_and_the_rate():
    drop = InputDropout(0.3)
    drop.readers = 1
    torch.manual_seed(0)
    kept = drop.mask(torch.zeros(200, 500))
    assert abs(kept.float().mean().item() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 100_000)
    layer = build()
    layer.dropout = drop
    x = random(1, IN, dtype=torch.float32)
    mean = torch.stack([layer(x).detach() for _ in range(4000)]).mean(0)
    spread = (formula(layer, x) - layer.base(x)).norm()
    assert (mean - formula(layer, x)).norm() < 0.1 * spread


class Counter:
    """Counts the masks drawn."""

    def __init__(self, monkeypatch):
        self.masks, rand_like = [], torch.rand_like
        monkeypatch.setattr(torch, "rand_like", lambda x, **kw: self.masks.append(1) or rand_like(x, **kw))


def readers(count: int, p: float = 0.5) -> list[LoRALinear]:
    shared = InputDropout(p)
    layers = [build(seed=seed) for seed in range(count)]
    for layer in layers:
        layer.dropout = shared
        shared.readers += 1
    return layers


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_share_an_input_see_one_mask(autocast, monkeypatch):
    counter = Counter(monkeypatch)
    layers = readers(3)
    for layer in layers:  # equal A and B over a zero base: equal outputs exactly when the masks are equal
        layer.load_state_dict(layers[0].state_dict())
    x = random(8, IN, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, *others = [layer(x) for layer in layers]
        assert len(counter.masks) == 1
        assert all(torch.equal(first, y) for y in others)
        assert not torch.equal(layers[0](x.clone()), first)  # another input, another mask
    assert len(counter.masks) == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_held_after_the_last_reader(autocast):
    layers = readers(2)
    x = random(8, IN, dtype=torch.float32)
    alive = weakref.ref(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer in layers:
            layer(x)
    assert layers[0].dropout._mask is None
    del x
    gc.collect()
    assert alive() is None


def test_a_dead_input_is_not_mistaken_for_a_new_one(monkeypatch):
    counter = Counter(monkeypatch)
    q, _ = readers(2)
    for _ in range(3):  # only one of two readers reads: each x is new, even at the old address
        q(random(8, IN, dtype=torch.float32))
    assert len(counter.masks) == 3


def test_a_starts_kaiming_uniform_and_b_zero():
    base = nn.Linear(400, 50)
    layer = LoRALinear(base, 16, 2.0)
    layer.start(torch.Generator().manual_seed(0))
    A, B = layer.lora_A[ALL_ROWS], layer.lora_B[ALL_ROWS]
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + a^2) fan_in)) with a = sqrt(5)
    assert A.shape == (16, 400) and B.shape == (50, 16)
    assert A.abs().max() <= bound and A.abs().max() > 0.99 * bound
    assert abs(A.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    assert B.abs().max() == 0
    again = LoRALinear(base, 16, 2.0)
    again.start(torch.Generator().manual_seed(0))
    assert torch.equal(again.lora_A[ALL_ROWS], A)


def test_the_order_of_parts_is_that_of_rows():
    layer = build(PARTS["not sorted by name"])
    assert list(layer.lora_A) == list(layer.lora_B) == ["q", "v", "k"]
    assert [name for name, _ in layer.named_parameters()][-3:] == ["lora_B.q", "lora_B.v", "lora_B.k"]


def test_scaling():
    assert scaling(8, 16) == 2.0
    assert scaling(16, 16, rslora=True) == 4.0
    assert build(alpha=6.0).scaling == 2.0


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_dimensions(conv):
    layer = build(conv=conv)
    assert (layer.in_features, layer.out_features) == adapted.dimensions(layer.base) == (IN, OUT)
    assert lora.out_in(layer.base).shape == (OUT, IN)


@pytest.mark.parametrize("parts", PARTS)
def test_delta_is_s_times_b_times_a_on_the_parts_rows(parts):
    layer = build(PARTS[parts])
    expected = torch.zeros(OUT, IN)
    for part, rows in layer.rows.items():
        expected[row_indices(rows)] = layer.scaling * layer.lora_B[part].detach() @ layer.lora_A[part].detach()
    torch.testing.assert_close(layer.delta(), expected)


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", ["whole", "kv heads"])
def test_merged_is_a_plain_layer_that_computes_the_same(parts, bias, conv):
    layer = build(PARTS[parts], conv=conv, bias=bias)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    plain = layer.merged()
    assert type(plain) is type(layer.base)
    assert plain.state_dict().keys() == layer.base.state_dict().keys()
    assert not any(p.requires_grad for p in plain.parameters())
    assert plain.weight.is_contiguous() and plain.weight.shape == layer.weight.shape
    x = random(6, IN, dtype=torch.float32)
    torch.testing.assert_close(plain(x), formula(layer, x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert plain.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once(dtype, conv):
    layer = build(PARTS["thirds, q and v"], conv=conv, dtype=dtype)
    plain = layer.merged()
    exact = lora.out_in(layer.base).double()
    for part, rows in layer.rows.items():
        BA = layer.lora_B[part].detach().double() @ layer.lora_A[part].detach().double()
        exact[row_indices(rows)] += layer.scaling * BA
    assert plain.weight.dtype == dtype
    error = (lora.out_in(plain).double() - exact).abs()
    # half a unit in the last place, and a hair for the float32 sum
    mantissa = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) + 1 - mantissa)
    assert (error <= 0.5 * ulp + 1e-5).all()
    assert torch.equal(plain.bias, layer.bias)
    k = torch.arange(8, 16)  # rows of no part keep their bits
    assert torch.equal(lora.out_in(plain)[k], lora.out_in(layer.base)[k])


def test_merged_keeps_the_mode():
    assert not build().eval().merged().training
    assert build().train().merged().training
