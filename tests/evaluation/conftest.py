"""The tokenizers and files of the data tests."""

from tests.data.conftest import plain, with_bos, write

__all__ = ["plain", "with_bos", "write"]
