"""The memory that training will need, from running the real step on tensors that have shapes but no values.

torch's FakeTensorMode allocates nothing, so one forward and backward of the real code (flat rows, fused LoRA, chunked
logits, checkpointing) shows every tensor and its lifetime for any family and setting; the largest sum is the peak.

One part can't be seen this way: on a CPU, freed memory returns to the C library's heap, and its fragments stay resident.
They come from everything a layer allocates, kept or recomputed, so checkpointing has as many. HEAP is their measured share.
With a quantized base freed blocks go back to the system, and there are hardly any.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import first_line, printable
from lora_ft.data.batches import StepPlan
from lora_ft.data.cache import release
from lora_ft.data.examples import column_array
from lora_ft.nn.attention import Isolation
from lora_ft.nn.layout import Layout
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.quantized import QuantizedLinear
from lora_ft.nn.rows import Segment, Tree

HEAP = 0.4  # of a step's peak without checkpointing, with glibc's malloc; 0.27 to 0.69 on four models
SEARCHED_STEPS = 5000  # of a plan, for its largest rows
READ_STEPS = 50  # of these, whose tokens are read


class Row(NamedTuple):
    """A flat row: its segments, and how many of its tokens are supervised."""

    segments: list[Segment]
    supervised: int

    @property
    def tokens(self) -> int:
        """Its tokens."""
        return sum(s.length for s in self.segments)

    def with_fewer(self, at_most: int = 32) -> "Row":
        """The same tokens in fewer segments, so that the estimate is quick: attention memory is linear in tokens."""
        size = -(-len(self.segments) // at_most)
        parents = {s.parent for s in self.segments}
        merged: list[Segment] = []
        place: dict[int | None, int | None] = {None: None}  # of a segment that others continue, among `merged`
        for parent, run in itertools.groupby(enumerate(self.segments), lambda s: (s[1].parent, s[0] in parents)):
            alike = [*run]
            step = 1 if parent[1] else size
            for i in range(0, len(alike), step):
                merged.append(Segment(sum(s.length for _, s in alike[i : i + step]), place[parent[0]]))
                place[alike[i][0]] = len(merged) - 1
        return Row(merged, self.supervised)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training."""

    runtime: int  # interpreter and libraries (0 on a GPU, whose allocator doesn't hold them)
    weights: int  # frozen parameters and buffers
    adapter: int  # trained parameters and their gradients
    optimizer: int  # its moments
    activations: int  # all other tensors of a step
    logits: int  # tensors over the vocabulary, for one chunk of tokens at a time
    heap: int  # freed memory that the C library keeps (0 on a GPU)
    total: int


def largest_rows(plan: StepPlan, virtual: int = 0) -> list[Row]:
    """The rows with the most tokens and with the most supervised tokens; virtual: virtual tokens before each example."""
    sizes = {name: column_array(plan.dataset, name) for name in ("tokens", "supervised")}
    steps = [plan.examples(step) for step in range(min(len(plan), SEARCHED_STEPS))]
    if plan.packing.share:  # needs the tokens themselves, so it reads the steps with the most
        totals = np.array([[column[examples].sum() for column in sizes.values()] for examples in steps])
        steps = [steps[i] for i in {*totals.argsort(0)[-READ_STEPS:].flat}]
    rows = []
    for examples in steps:
        ids: list = [range(virtual + int(sizes["tokens"][i])) for i in examples]
        if plan.packing.share:
            ids = [[*range(-virtual, 0), *plan.dataset[i]["input_ids"]] for i in examples]
            release(plan.dataset)
        for row in plan.packing.rows(ids):
            supervised = sum(int(sizes["supervised"][examples[i]]) for i in row)
            rows.append(Row(Tree.of([ids[i] for i in row], plan.packing.share).segments(), supervised))
    most = max(rows, key=lambda row: (row.tokens, row.supervised))
    heads = max(rows, key=lambda row: (row.supervised, row.tokens))
    return [most] if heads.supervised == most.supervised else [most, heads]


def estimate(
    build: Callable[[], PreTrainedModel],
    rows: Sequence[Row],
    *,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    moments: int = 2,
    runtime: int = 0,
) -> Memory:
    """The memory that training needs on the most expensive of `rows`.

    Args:
        build: makes the model on the device and in the dtype of the run, under FakeTensorMode; what trains requires gradients.
        autocast: the dtype of mixed precision.
        moments: numbers that the optimizer keeps for each trained one (2 for AdamW).
        runtime: bytes that the process has before the model is loaded; 0, as on a GPU, leaves out the heap too.

    Raises:
        ModelError: the model's step depends on values, so it can't be estimated.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # the error says it
    try:
        with FakeTensorMode():
            model = build()
            trained = [p for p in model.parameters() if p.requires_grad]
            held = bytes_of([*model.parameters(), *model.buffers()])
            if not checkpointing:
                keep_gate_and_up(model)
            peak = _largest_step(model, rows, autocast)
            returns = any(isinstance(module, QuantizedLinear) for module in model.modules())  # see `load_base`
            heap = int(HEAP * sum(peak.values())) if runtime and not returns else 0
            if checkpointing:
                model.activation_checkpointing_enable()
                peak = _largest_step(model, rows, autocast)
    except ModelError:
        raise
    except Exception as e:  # models that need values, and kernels that need memory, raise many classes
        why = printable(first_line(e), 120)
        text = f"memory: can't be estimated: torch can't run this model's step without values ({why})."
        raise ModelError(text) from e
    parts = {"runtime": runtime, "weights": held - bytes_of(trained), "adapter": 2 * bytes_of(trained)}
    parts |= {"optimizer": moments * sum(4 * p.numel() for p in trained), **peak, "heap": heap}
    return Memory(**parts, total=sum(parts.values()))


def _largest_step(model: PreTrainedModel, rows: Sequence[Row], autocast: torch.dtype | None) -> dict[str, int]:
    """`_step` of the row for which that is most."""
    isolation = Isolation.guess_from_config(model, max(max(Layout(row.segments).ends) for row in rows))
    peaks = [_step(model, row.with_fewer(), isolation, autocast) for row in rows]
    return max(peaks, key=lambda kinds: sum(kinds.values()))


def _step(model: PreTrainedModel, row: Row, isolation: Isolation, autocast: torch.dtype | None) -> dict[str, int]:
    """Bytes that a micro-batch allocates at its peak, beside parameters and their gradients."""
    device, tokens = model.device, row.tokens
    model.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # they exist from the first micro-batch on
    head = model.get_output_embeddings()
    counted = _Live([*model.parameters(), *model.buffers()], head.weight.shape[0] if head is not None else 0)
    with counted:
        ids, positions = (torch.zeros(1, tokens, dtype=torch.long, device=device) for _ in range(2))
        keep, targets = (torch.zeros(row.supervised, dtype=torch.long, device=device) for _ in range(2))
        with isolation.row(model, row.segments):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = supervised_loss(model, ids, positions, keep, targets)
            loss.backward()
    return counted.at_peak


class _Live(TorchDispatchMode):
    """Counts the bytes of live tensors by kind; `at_peak` holds them at the moment of the largest sum."""

    def __init__(self, known: Sequence[Tensor], vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.known = {_storage(t) for tensor in known for t in (tensor, tensor.grad) if t is not None}
        self.live = {"activations": 0, "logits": 0}
        self.at_peak = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.known:
                kind = "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "activations"
                key, storage = _storage(tensor), tensor.untyped_storage()
                self.known.add(key)
                self.live[kind] += storage.nbytes()
                weakref.finalize(storage, self.drop, key, kind, storage.nbytes())
        if sum(self.live.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.live)
        return out

    def drop(self, key: int, kind: str, size: int) -> None:
        """Stop counting a storage that was freed."""
        self.known.discard(key)
        self.live[kind] -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of the tensors' storages; a shared one (a tied head) counts once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def moments_of(args: TrainingArguments) -> int:
    """Numbers that the Trainer's optimizer keeps for each trained one, from a step on a tiny parameter."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    parameter = nn.Parameter(torch.zeros(8, device=args.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = kind([parameter], **settings)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in state)
