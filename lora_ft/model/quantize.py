"""A base whose blocks keep their linear weights in eight or four bits (nn/quantized.py), quantized one by one as it is loaded.

Embeddings, the head, norms and biases stay as they are, as do experts that are stored as one tensor of three dimensions.
"""

import importlib.util
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import listed
from lora_ft.model.stored import is_finite
from lora_ft.nn.adapted import out_in
from lora_ft.nn.forms import Form
from lora_ft.nn.quantized import LinearInFile, QuantizedLinear

METHOD = "lora-ft"  # its name among transformers' quantizers
PLAIN = (nn.Linear.forward, Conv1D.forward, FalconLinear.forward)  # a router of experts may be a subclass with another


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Path -> linear layer of the blocks: those in a list of modules, without the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and type(module).forward in PLAIN
        and module is not head
        and any(name.isdigit() for name in path.split("."))
    }


def quantize(model: PreTrainedModel, form: Form | None) -> PreTrainedModel:
    """Quantize a model in place, which may be on the meta device; None changes nothing. Returns it."""
    if form:
        for path, module in quantizable(model).items():
            model.set_submodule(path, QuantizedLinear(module, out_in(module), form))
    return model


def check_form(form: Form | None) -> None:
    """Raise ConfigError if a form needs a package that is not installed."""
    if form == "nf4" and not importlib.util.find_spec("bitsandbytes"):
        way_out = "pip install 'lora-ft[nf4]', or use int8, which needs nothing."
        raise ConfigError(f"model.quantization: nf4 needs bitsandbytes, which is not installed: {way_out}")


def refuse_quantized(name: str, config: PretrainedConfig) -> None:
    """Raise ModelError for a base that is stored in few bits already."""
    if (stored := getattr(config, "quantization_config", None)) is not None:
        get = stored.get if isinstance(stored, dict) else vars(stored).get
        raise ModelError(
            f"model {name}: its weights are stored quantized already ({get('quant_method')}). Name the model in full "
            "precision, which model.quantization then quantizes; or leave model.quantization out."
        )


class Quantization(QuantizationConfigMixin):
    """How `from_pretrained` is told to quantize, as an argument.

    form: None leaves the weights in their files. weights: the stored ones by name. damaged: the names of those that turned out
    to hold NaN or inf.
    """

    def __init__(self, form: Form | None, weights: dict[str, Any]):
        self.quant_method, self.form, self.weights = METHOD, form, weights
        self.damaged: list[str] = []

    def __deepcopy__(self, memo: dict) -> "Quantization":
        return self  # transformers copies the config that holds it, and open files can't be copied

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "form": self.form}


class _Quantizer(HfQuantizer):
    """Tells transformers which weights to hand to `_Quantize`; it then reads one tensor at a time."""

    is_trainable = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.names = {f"{path}.weight" for path in quantizable(model)}
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def is_serializable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    """Puts a QuantizedLinear in the place of the layer whose weight has been read."""

    def __init__(self, settings: Quantization):
        self.settings = settings

    def convert(self, input_dict: dict, *, source_patterns, model, missing_keys, **kwargs: Any) -> dict:
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        if source_patterns[0] in self.settings.weights:  # as stored: what is quantized doesn't depend on model.dtype
            value = self.settings.weights[source_patterns[0]][...]
        if not is_finite(value):
            self.settings.damaged.append(name)
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        W: Tensor = value.T if isinstance(layer, Conv1D) else value
        quantized: nn.Module
        if self.settings.form:
            quantized = QuantizedLinear(layer, W, self.settings.form)
        elif source_patterns[0] in self.settings.weights:
            quantized = LinearInFile(layer, self.settings.weights[source_patterns[0]])
        else:
            return input_dict
        quantized._is_hf_initialized = True  # else transformers would initialize it
        model.set_submodule(path, quantized)
        missing_keys.discard(name)
        return {}


def forget(model: PreTrainedModel, settings: Quantization) -> None:
    """Make a loaded model an ordinary one for transformers and its Trainer, which refuse those of a quantizer.

    Raises ModelError if a weight holds NaN or inf.
    """
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)  # some models ask whether it is there
    if settings.damaged:
        raise ModelError(f"the weights {listed(settings.damaged, 3)} hold NaN or inf.")


# transformers' decorators refuse a name that is there, as when this module is loaded again
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = Quantization, _Quantizer
