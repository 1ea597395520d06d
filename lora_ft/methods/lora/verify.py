"""Verification of a merge in two parts: every matrix on random inputs, then the logits of complete models."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.files import apply_adapter
from lora_ft.methods.lora.inject import MERGED
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.model.files import Base
from lora_ft.model.load import load_base
from lora_ft.model.offload import loaded_in_float32
from lora_ft.nn.adapted import bare, out_in, with_weight
from lora_ft.nn.forms import Form
from lora_ft.nn.lora import LoRALinear
from lora_ft.nn.quantized import QuantizedLinear
from lora_ft.nn.token_rows import TiedHeadRows
from lora_ft.nn.whole import WholeModule

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "It was one of the best films of the year: funny, sad, and 2 hours long.",
)
U32 = torch.finfo(torch.float32).eps / 2


def random_signs(in_features: int, columns: int = 4) -> Tensor:
    """x (in, columns) of -1 and 1, float64: every weight counts in full, and |x| = 1 keeps the bound simple."""
    generator = torch.Generator().manual_seed(in_features)
    return torch.randint(0, 2, (in_features, columns), generator=generator).double() * 2 - 1


def matrix_error(W: Tensor, merged: Tensor, A: Tensor, B: Tensor, s: float, x: Tensor) -> tuple[float, float]:
    """max |W' x - (W x + s B A x)|, and the largest quotient of such an error and its bound; all in float64.

    W, merged: (rows, in); A: (rank, in); B: (rows, rank); x: (in, n), entries -1 and 1.

    The bound is rigorous, element by element. Rounding to nearest errs by at most u |W'| (u = eps / 2 of the stored
    dtype) plus the smallest step; W + s B A in float32 by at most (rank + 4) u32 |s| |B| |A| + 2 u32 |W|. These are
    summed over a row, since |x| = 1. What float64 itself loses is covered by 2^-45 of the magnitudes.
    """
    info = torch.finfo(merged.dtype)
    W, new, A, B = W.double(), merged.double(), A.double(), B.double()
    error = (new @ x - (W @ x + s * (B @ (A @ x)))).abs()
    smallest = info.smallest_normal * (info.eps if merged.dtype == torch.float16 else 1.0)
    change = abs(s) * (B.abs() @ A.abs().sum(1, keepdim=True))
    sums, sums_new = W.abs().sum(1, keepdim=True), new.abs().sum(1, keepdim=True)
    bound = info.eps / 2 * sums_new + smallest * W.shape[1] + U32 * ((A.shape[0] + 4) * change + 2 * sums)
    bound += 2.0**-45 * (sums + sums_new + change)
    quotient = torch.where(error <= bound, error / bound, torch.inf)  # NaN counts as inf
    return error.max().item(), quotient.max().item()


def sample_rows(record: dict, tokenizer, vocabulary: int) -> list[list[int]]:
    """Rows of token ids to compare logits on: those in the record, or a few sentences, and always a row of random ids."""
    samples = record.get("samples")
    rows = [row for row in samples if isinstance(row, list) and row] if isinstance(samples, list) else []
    rows = [row[:64] for row in rows if all(type(i) is int and 0 <= i < vocabulary for i in row)][:8]
    if not rows and tokenizer is not None:
        rows = [ids for ids in (tokenizer(text)["input_ids"] for text in SENTENCES) if ids and max(ids) < vocabulary]
    return rows + [torch.randint(vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()]


def compare_logits(
    base: Base,
    adapter: AdapterFile,
    merged: Base,
    dtypes: dict[str, torch.dtype],
    rows: list[list[int]],
    form: Form | None = None,
) -> dict:
    """Compare the logits of base + adapter and of the merged model on `rows`, in float32, one model in memory at a time.

    The effect of rounding the merged weights is measured separately, on base + adapter merged and rounded in memory. ModelError
    unless both hold:

    - the merged model on disk equals that one to 1e-4 of the largest logit (plus 1/16 of the rounding's effect: a sum in
      another order may round a few weights the other way);
    - the total difference is at most 1e-4 of the largest logit for float32, 8 eps of it for a lower precision.

    Measured on SmolLM2-135M with q and v adapted at rank 8: rounding to bfloat16 or float16 moves the logits by 0.3 to 0.8
    eps of the largest one; a correct merge meets the first condition with a difference of 0, and one that lacks the adapter
    of a single matrix of 60 (B normal, std 0.02) exceeds it 7 to 19 times.

    dtypes: module -> the dtype that its merged weight is stored in. rows: token ids. form: of the quantized base that it is
    merged onto, whose weights are all rounded.
    """
    model = load_base(base, "float32", quantization=form)
    apply_adapter(model, adapter)
    exact = logits(model, rows)
    with bare(model):
        without = logits(model, rows)
    with merged_and_rounded(model, dtypes):
        rounded = logits(model, rows)
    del model
    gc.collect()
    with loaded_in_float32(merged) as model:
        found = logits(model, rows)
    del model
    gc.collect()
    scale = max(t.abs().max().item() for t in exact)
    allowed = max(1e-4 if d == torch.float32 else 8 * torch.finfo(d).eps for d in dtypes.values())
    rounding = largest(rounded, exact)[0]
    close, tolerance = largest(found, rounded), 1e-4 * scale + rounding / 16
    total = largest(found, exact)
    for (difference, row, position), limit in ((close, tolerance), (total, allowed * scale)):
        if not difference <= limit:
            raise ModelError(
                f"the merge failed its verification: logits differ by {difference:.3g} in sample row {row}, position "
                f"{position}, where {limit:.3g} is allowed (largest logit {scale:.3g}). The output was not kept."
            )
    return {
        "rows": len(rows),
        "positions": sum(map(len, rows)),
        "difference": total[0],
        "tolerance": allowed * scale,
        "rounding": rounding,
        "beyond_rounding": close[0],
        "beyond_rounding_tolerance": tolerance,
        "adapter_effect": largest(exact, without)[0],
        "largest_logit": scale,
    }


def merging(model: PreTrainedModel) -> list[str]:
    """The modules whose weights a merge changes: LoRA layers, those trained in full, and quantized ones, which become plain."""
    bases = {id(m.base) for m in model.modules() if isinstance(m, LoRALinear)}
    kinds = (*MERGED, QuantizedLinear)
    return [path for path, m in model.named_modules() if isinstance(m, kinds) and id(m) not in bases]


@contextmanager
def merged_and_rounded(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Within it each of these modules computes as a plain one with its merged weight, rounded to the dtype.

    The weight is made whenever it is needed, so that one of them is in memory at a time.
    """
    embedding = model.get_input_embeddings()
    of_rows = next((dtypes[path] for path, m in model.named_modules() if m is embedding and path in dtypes), None)
    heads = {path: of_rows for path, m in model.named_modules() if isinstance(m, TiedHeadRows) and of_rows}
    layers = [(model.get_submodule(path), dtype) for path, dtype in (dict(dtypes) | heads).items()]
    try:
        for layer, dtype in layers:
            layer.forward = partial(_rounded_forward, layer, dtype)
        yield
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)


def _rounded_forward(layer: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    plain = layer.merged() if isinstance(layer, MERGED) else with_weight(layer, out_in(layer))
    for parameter in plain.parameters() if isinstance(layer, WholeModule) else [plain.weight]:
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return plain(x)


@torch.no_grad()
def logits(model, rows: list[list[int]]) -> list[Tensor]:
    """The logits (tokens, vocabulary) of each row, in float32."""
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]


def largest(a: list[Tensor], b: list[Tensor]) -> tuple[float, int, int]:
    """(largest absolute difference, row, position) of two lists of (tokens, vocabulary); NaN counts as infinite."""
    best = (-1.0, 0, 0)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        by_position = (x - y).abs().amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        value, position = by_position.max(0)
        best = max(best, (value.item(), i, int(position)))
    return best
