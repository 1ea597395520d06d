"""Write an adapter alone as llama.cpp's GGUF, for `--lora FILE` with a base's, like its convert_lora_to_gguf.py does."""

from pathlib import Path

import gguf
from transformers import PreTrainedModel

from lora_ft.commands.export.gguf_format import Weight, by_number, gguf_name, layout, reordered, write_gguf
from lora_ft.core.errors import ModelError
from lora_ft.core.names import published_name
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.portable import padded, plain_tensors


def write_adapter_gguf(adapter: AdapterFile, model: PreTrainedModel, path: Path, dtype: str, base_name: str) -> int:
    """Write `adapter` of the base `model`, which may be on the meta device, as a GGUF file. Returns its size in bytes.

    A and B of blk.0.attn_q.weight are blk.0.attn_q.weight.lora_a (rank, in) and .lora_b (out, rank); B includes the scaling,
    and adapter.lora.alpha is the rank.

    Raises:
        ModelError: the family is not supported, or the adapter changes a tied head.
    """
    order = layout(model.config)
    tensors, R = padded(plain_tensors(adapter))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = []
    for module in sorted(tensors, key=by_number):
        if tied and model.get_submodule(module) is model.get_output_embeddings():
            raise ModelError(
                f"{adapter.folder}: adapts the head, which is tied to the embedding; llama.cpp can't load such an adapter. "
                "Export the merged model instead: add --merged."
            )
        name, (A, B) = gguf_name(order, f"{module}.weight"), tensors[module]
        B = reordered(order, f"{module}.weight", B)
        weights += [Weight(f"{name}.lora_{x}", tuple(M.shape), M.clone) for x, M in (("a", A), ("b", B))]
    writer = gguf.GGUFWriter(path, order.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(R))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(published_name(base_name)).name)
    return write_gguf(writer, weights, dtype)
