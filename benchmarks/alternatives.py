"""What was tried to make a step faster on a CPU and left out: the parts alone, each against what a step does now, in turns.

    python benchmarks/alternatives.py [--rounds 9]

At the shapes of SmolLM2-135M, with the weights of 30 layers one after the other, so that none is in the processor's cache.
Prints a line per case: the median of the ratios "now / alternative" (above 1: the alternative is faster) and its range.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from bench import machine
from torch import Tensor

LAYERS, WIDTH, HEADS, GROUP, HEAD = 30, 576, 3, 3, 64
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # (out, in) of a layer


def compare(title: str, now: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    """Time both in turns and print their ratio."""
    ratios = []
    for number in range(rounds + 1):
        seconds = []
        for run in (now, other):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        ratios += [seconds[0] / seconds[1]] if number else []  # the first is to warm up
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{title}: {statistics.median(ratios):.2f} ({spread}); now {1000 * seconds[0]:.0f} ms", flush=True)


def packed_weights(tokens: int, rounds: int) -> None:
    """Frozen weights packed once for oneDNN, forward and backward."""
    weights = [torch.randn(shape) * 0.02 for _ in range(LAYERS) for shape in SHAPES]
    inputs = {n: torch.randn(tokens, n) for n in (192, 576, 1536)}
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    for way, ws in (("forward", weights), ("backward", [w.T.contiguous() for w in weights])):
        packed = [pack(w, tokens) for w in ws]
        pairs = list(zip(ws, packed, strict=True))
        compare(
            f"packed weights, {tokens} tokens, {way}",
            lambda ws=ws: [F.linear(inputs[w.shape[1]], w) for w in ws],
            lambda pairs=pairs: [linear(inputs[w.shape[1]], p, None, "none", [], "") for w, p in pairs],
            rounds,
        )


def one_thin_product(tokens: int, rank: int, rounds: int) -> None:
    """The As of q, k and v as one product, and one sum of their dX, of all layers."""
    X, D = ([torch.randn(tokens, WIDTH) for _ in range(LAYERS)] for _ in range(2))
    As = [[torch.randn(rank, WIDTH) for _ in range(3)] for _ in range(LAYERS)]
    joined, dS = [torch.cat(a) for a in As], [torch.randn(tokens, 3 * rank) for _ in range(LAYERS)]

    def apart() -> None:
        for x, own, s, d in zip(X, As, dS, D, strict=True):
            for A, s_i in zip(own, s.chunk(3, -1), strict=True):
                x @ A.T, s_i.T @ x, d.addmm_(s_i, A, beta=0)
            d + d, d + d  # autograd's sum of three dX

    def at_once() -> None:
        for x, A, s, d in zip(X, joined, dS, D, strict=True):
            x @ A.T, s.T @ x, d.addmm_(s, A, beta=0)

    compare(f"one thin product, {tokens} tokens, rank {rank}", apart, at_once, rounds)


class Blocks(torch.autograd.Function):
    """Causal attention as batched products over blocks of queries; q: (HEADS, GROUP, n, HEAD), k, v: (HEADS, n, HEAD)."""

    @staticmethod
    def weights(q: Tensor, k: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        Q = q[:, :, start:end].reshape(HEADS, -1, HEAD)
        scores = torch.bmm(Q, k[:, :end].transpose(1, 2)).mul_(1 / math.sqrt(HEAD))
        mask = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores.view(HEADS, GROUP, end - start, end)[..., start:end].masked_fill_(mask, -math.inf)
        return Q, scores

    @staticmethod
    def forward(ctx, q, k, v, size):
        out, sums, edges = torch.empty_like(q), [], [*range(0, q.shape[2], size), q.shape[2]]
        for start, end in zip(edges, edges[1:], strict=False):
            _, scores = Blocks.weights(q, k, start, end)
            sums.append(scores.logsumexp(-1, keepdim=True))
            P = scores.sub_(sums[-1]).exp_()
            out[:, :, start:end] = torch.bmm(P, v[:, :end]).view(HEADS, GROUP, end - start, HEAD)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.edges = edges
        return out

    @staticmethod
    def backward(ctx, dO):
        q, k, v, out, *sums = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (dO * out).sum(-1, keepdim=True)
        for start, end, total in zip(ctx.edges, ctx.edges[1:], sums, strict=False):
            Q, scores = Blocks.weights(q, k, start, end)
            P, d = scores.sub_(total).exp_(), dO[:, :, start:end].reshape(HEADS, -1, HEAD)
            dv[:, :end].baddbmm_(P.transpose(1, 2), d)
            dS = torch.bmm(d, v[:, :end].transpose(1, 2)).sub_(delta[:, :, start:end].reshape(HEADS, -1, 1))
            dS.mul_(P).mul_(1 / math.sqrt(HEAD))
            dq[:, :, start:end] = torch.bmm(dS, k[:, :end]).view(HEADS, GROUP, end - start, HEAD)
            dk[:, :end].baddbmm_(dS.transpose(1, 2), Q)
        return dq, dk, dv, None


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a step does now."""
    k, v = (x[:, None].expand(-1, GROUP, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_in_blocks(length: int, size: int, rounds: int) -> None:
    """Forward and backward of 1,024 tokens in sequences of `length`."""
    shapes = ((HEADS, GROUP, length, HEAD), (HEADS, length, HEAD), (HEADS, length, HEAD))
    rows = [[torch.randn(s, requires_grad=True) for s in shapes] for _ in range(1024 // length)]
    first = causal(*rows[0])
    assert torch.allclose(first, Blocks.apply(*rows[0], size), atol=1e-4)

    def both(attend: Callable[..., Tensor]) -> None:
        for row in rows:
            y = attend(*row)
            y.backward(torch.ones_like(y))

    blocks: Sequence = (lambda: both(causal), lambda: both(lambda *row: Blocks.apply(*row, size)))
    compare(f"attention in blocks of {size}, sequences of {length}", *blocks, rounds)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    print(machine()["processor"])
    with torch.no_grad():
        for tokens in (16, 64, 326, 1000):
            packed_weights(tokens, rounds)
        for tokens, rank in product((326, 1024), (8, 16, 64)):
            one_thin_product(tokens, rank, rounds)
    for length, size in product((19, 64, 256, 1024), (64, 128, 256)):
        if size <= max(64, length):
            attention_in_blocks(length, size, rounds)


if __name__ == "__main__":
    main()
