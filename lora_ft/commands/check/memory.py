"""The memory that training will need, found by running its own step on tensors that have shapes but no values.

torch's FakeTensorMode computes shapes, dtypes and devices of everything and allocates nothing, so one forward and backward
of the real code (flat rows, fused LoRA, chunked logits, checkpointing) shows every tensor it would make and when each goes:
their sum at its highest is the peak. So any family, method or setting is counted by what it does, and no constant is fitted.
What the process itself takes, interpreter and libraries, is read from the system.

One thing can't be seen so: on a CPU freed memory goes back to the C library's heap (device.keep_freed_memory), whose holes
stay resident: torch asks for aligned blocks, the slivers cut off wait in malloc's cache, and neighbours that were freed can't
become one. They follow from all that a layer makes, kept for the backward or made again there, so checkpointing has as many.
HEAP is their measured share.
"""

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import printable
from lora_ft.data.batches import StepPlan
from lora_ft.nn.attention import Isolation
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.mlp import keep_gate_and_up

HEAP = 0.4  # of a step's peak without checkpointing, in glibc's malloc; 0.27 to 0.69 on four models
LOOKED_AT = 5000  # steps of a plan that are searched for its largest rows


class Row(NamedTuple):
    """A flat row: lengths of its examples, and how many of its tokens are supervised."""

    lengths: tuple[int, ...]
    supervised: int

    def with_fewer(self, at_most: int = 32) -> "Row":
        """The same tokens in fewer examples: attention's memory is linear in them, and the estimate stays quick."""
        size = -(-len(self.lengths) // at_most)
        return Row(tuple(sum(self.lengths[i : i + size]) for i in range(0, len(self.lengths), size)), self.supervised)


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when training needs most.

    runtime: interpreter and libraries (0 on a GPU, whose allocator doesn't hold them). adapter: what is trained, and its
    gradients; weights: all other parameters and buffers. logits: tensors over the vocabulary, for one chunk of tokens
    at a time; activations: everything else that the step makes. heap: freed memory that the C library keeps (0 on a GPU).
    """

    runtime: int
    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    heap: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def largest_rows(plan: StepPlan, virtual: int = 0) -> list[Row]:
    """The rows that may need most memory: the one with most tokens, and the one with most of them supervised.

    virtual: tokens that stand in front of each example beside its own.
    """
    sizes = plan.dataset.select_columns(["tokens", "supervised"]).with_format("numpy")[:]
    rows = []
    for step in range(min(len(plan), LOOKED_AT)):
        examples = plan.examples(step)
        lengths = [virtual + int(sizes["tokens"][i]) for i in examples]
        for row in plan.packing.rows(lengths):
            supervised = sum(int(sizes["supervised"][examples[i]]) for i in row)
            rows.append(Row(tuple(lengths[i] for i in row), supervised))
    most = max(rows, key=lambda row: (sum(row.lengths), row.supervised))
    heads = max(rows, key=lambda row: (row.supervised, sum(row.lengths)))
    return [most] if heads.supervised == most.supervised else [most, heads]


def estimate(
    build: Callable[[], PreTrainedModel],
    rows: Sequence[Row],
    *,
    isolation: Isolation | None = None,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    moments: int = 2,
    runtime: int = 0,
) -> Memory:
    """Memory of training the model that `build` makes, on the row of `rows` that needs most.

    Args:
        build: makes the model, on the device and in the dtype of the run, what is trained requiring gradients. It is called
            where tensors have no values.
        packing: how examples are kept apart; None takes what the architecture is expected to use.
        moments: numbers that the optimizer keeps for each that is trained (AdamW: 2).
        runtime: bytes that the process has before the model is there; 0, as on a GPU, leaves its heap out too.

    Raises:
        ModelError: the model computes something that depends on values, so the step can't be run.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it is said in the error
    try:
        with FakeTensorMode():
            model = build()
            trained = [p for p in model.parameters() if p.requires_grad]
            held = bytes_of([*model.parameters(), *model.buffers()])
            if not checkpointing:
                keep_gate_and_up(model)
            way = isolation or Isolation.guess_from_config(model, max(max(row.lengths) for row in rows))
            peaks = [_step(model, row.with_fewer(), way, autocast) for row in rows]
            heap = int(HEAP * max(sum(peak.values()) for peak in peaks)) if runtime else 0
            if checkpointing:
                model.activation_checkpointing_enable()
                peaks = [_step(model, row.with_fewer(), way, autocast) for row in rows]
    except ModelError:
        raise
    except Exception as e:  # what a model may need of values, and torch of kernels, comes in many classes
        why = printable((str(e) or type(e).__name__).splitlines()[0], 120)
        raise ModelError(
            f"memory: can't be estimated, for torch can't run this model's step without values ({why})."
        ) from e
    growth = max(peaks, key=lambda peak: sum(peak.values()))
    return Memory(
        runtime=runtime,
        weights=held - bytes_of(trained),
        adapter=2 * bytes_of(trained),
        optimizer=moments * sum(4 * p.numel() for p in trained),
        activations=growth["activations"],
        logits=growth["logits"],
        heap=heap,
    )


def _step(model: PreTrainedModel, row: Row, isolation: Isolation, autocast: torch.dtype | None) -> dict[str, int]:
    """What a micro-batch makes on top of parameters and their gradients, in bytes at its peak."""
    device, tokens = model.device, sum(row.lengths)
    model.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # there from the step's first micro-batch on
    head = model.get_output_embeddings()
    counted = _Live([*model.parameters(), *model.buffers()], head.weight.shape[0] if head is not None else 0)
    with counted:
        ids, positions = (torch.zeros(1, tokens, dtype=torch.long, device=device) for _ in range(2))
        keep, targets = (torch.zeros(row.supervised, dtype=torch.long, device=device) for _ in range(2))
        with isolation.row(model, row.lengths):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = supervised_loss(model, ids, positions, keep, targets)
            loss.backward()
    return counted.at_peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by kind; at_peak has them at the moment of the largest sum."""

    def __init__(self, known: Sequence[Tensor], vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.known = {_storage(t) for tensor in known for t in (tensor, tensor.grad) if t is not None}
        self.now = {"activations": 0, "logits": 0}
        self.at_peak, self.peak = dict(self.now), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.known:
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        key, storage = _storage(tensor), tensor.untyped_storage()
        kind = "logits" if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "activations"
        self.known.add(key)
        self.now[kind] += storage.nbytes()
        weakref.finalize(storage, self.drop, key, kind, storage.nbytes())
        if sum(self.now.values()) > self.peak:
            self.at_peak, self.peak = dict(self.now), sum(self.now.values())

    def drop(self, key: int, kind: str, size: int) -> None:
        self.known.discard(key)
        self.now[kind] -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Their storages' bytes, a shared one (a tied head's) once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def moments_of(args: TrainingArguments) -> int:
    """Numbers that the Trainer's optimizer keeps for each trained one, seen on a step of a tiny one."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    parameter = nn.Parameter(torch.zeros(8, device=args.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = kind([parameter], **settings)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in state)


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system doesn't tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available(device: str) -> int:
    """Bytes of memory that are free for a new process, 0 where the system doesn't tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
