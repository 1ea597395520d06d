"""What an adapter is merged onto: the base's weights as they are stored, or as the training saw them if it quantized them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import listed
from lora_ft.model.quantize import quantizable
from lora_ft.nn.forms import Form
from lora_ft.nn.quantized import dequantized


@dataclass(frozen=True)
class Onto:
    """form: of the quantized weights; None for the stored ones.

    layers: name of a stored weight that was quantized -> its module, and whether the file has (in, out).
    """

    form: Form | None = None
    layers: Mapping[str, tuple[str, bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, stored: Mapping[str, str], form: Form | None) -> "Onto":
        """stored: see `stored_names`. Raises ModelError if a quantized weight is not in the files as one tensor."""
        layers = quantizable(model) if form else {}
        absent = [path for path in layers if f"{path}.weight" not in stored]
        if absent:
            problem = "so what they are quantized can't be written there. Merge with --onto original."
            raise ModelError(f"the base's files have no separate tensor for {listed(absent)}, {problem}")
        return cls(form, {stored[f"{path}.weight"]: (path, isinstance(m, Conv1D)) for path, m in layers.items()})

    def weight(self, name: str, W: Tensor) -> Tensor:
        """What to merge onto, in the layout of W: W itself, or what it is quantized, in float32."""
        if self.form is None or name not in self.layers:
            return W
        return dequantized(W.T, self.form).T.contiguous() if self.layers[name][1] else dequantized(W, self.form)
