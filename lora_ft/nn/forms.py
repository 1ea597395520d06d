"""The forms of quantized weights (nn/quantized.py), by name. Imports no torch."""

from typing import Literal

Form = Literal["nf4", "int8"]
