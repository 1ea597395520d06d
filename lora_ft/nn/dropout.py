"""Dropout on what an adapter reads."""

import weakref

import torch
from torch import Tensor


class InputDropout:
    """Dropout on the input of A, with one mask for all layers that read the same tensor.

    q, k and v of a layer read one x, as do gate and up: these `readers` share this object. (PEFT draws a mask for each; the
    expectation is the same.) p: the probability of dropping an element.
    """

    def __init__(self, p: float):
        self.p, self.readers, self._left = p, 0, 0
        self._x: weakref.ref[Tensor] | None = None
        self._mask: Tensor | None = None

    def mask(self, x: Tensor, tokens: slice = slice(None)) -> Tensor:
        """A mask of x (..., tokens, in) or some of its tokens, True (keep) with probability 1 - p; one for all readers of x."""
        if self._mask is None or self._x is None or self._x() is not x:
            self._x, self._left = weakref.ref(x), self.readers
            self._mask = torch.rand_like(x[..., tokens, :], dtype=torch.float32) >= self.p
        mask = self._mask
        self._left -= 1
        if self._left == 0:  # every reader has it: free its memory before the next step
            self._x = self._mask = None
        return mask
