"""Switching a trained method off, so that one model in memory is scored as its base and as what it became."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

Bare = Callable[[], AbstractContextManager[None]]  # within the context, the model computes its bare base


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within: the parameters hold `values`, which hold theirs meanwhile. No copy is made."""

    def exchange() -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data, value.data = value.data, parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()
