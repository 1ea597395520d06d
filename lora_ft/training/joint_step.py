"""An optimizer step, or an evaluation, of several runs at once: their micro-batches share rows of one model (nn/joint.py).

A run's gradients are those of `add_gradients` in a run alone, except for rounding: its micro-batches are cut as there, keep
their order, and draw from its own generators.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import first_line
from lora_ft.data.batches import MicroBatch, Shard
from lora_ft.distributed import processes
from lora_ft.methods.lora.inject import lora_layers, trainable
from lora_ft.methods.lora.multi import is_expert
from lora_ft.model.device import micro_batch_tokens, random_states
from lora_ft.nn.attention import Isolation
from lora_ft.nn.joint import BaseDropout, JointLoRALinear, Part, parts_of_row
from lora_ft.nn.loss import log_probabilities, supervised_losses
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.rows import Segment
from lora_ft.training.joint_rows import RunRows, RunStep, row_limit, rows, tokens_of


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with the same weights in memory, so that it can be adapted on its own."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class JointModel:
    """One base under the adapters of several runs, whose own models are clones of it.

    row_tokens: the setting train.micro_batch_tokens. bf16: compute in autocast, as accelerate has a run's own model
    do.

    Raises:
        ConfigError: as `check_joint`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        models: Mapping[int, PreTrainedModel],
        row_tokens: int | str,
        checkpointing: bool,
        bf16: bool = False,
    ):
        self.model, self.runs, device = clone(base), list(models), base.device.type
        if bf16:
            forward = torch.autocast(device, torch.bfloat16)(type(self.model).forward)
            self.model.forward = MethodType(convert_outputs_to_fp32(forward), self.model)
        self.row_tokens = row_tokens
        self._dropout: AbstractContextManager = BaseDropout()  # until `check` finds that no layer of the base draws one
        layers = {run: lora_layers(model) for run, model in models.items()}
        paths = [*dict.fromkeys(path for own in layers.values() for path in own)]
        check_joint(base, paths, checkpointing)
        for path in paths:
            own = {run: of_run[path] for run, of_run in layers.items() if path in of_run}
            self.model.set_submodule(path, JointLoRALinear(base.get_submodule(path), own))
        if device == "cpu":
            for p in (p for model in models.values() for p in trainable(model).values()):
                p.register_post_accumulate_grad_hook(partial(_move_gradient, torch.zeros_like(p)))
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        else:
            keep_gate_and_up(self.model)

    def add_gradients(self, steps: Sequence[RunStep], check: Callable[[], None]) -> dict[int, Tensor]:
        """Add the gradients of each run's mean loss to those of its parameters, equally on every process.

        check: called before each row; may raise to stop. Returns the runs' losses as `training.step.add_gradients` does.
        """
        self.model.train()
        totals = {s.run: torch.zeros((), device=self.model.device) for s in steps}
        for row in rows(steps, row_limit(self.row_tokens, self.model.device.type)):
            check()
            for run, loss in self._losses_of_row(row).items():
                totals[run] += loss
        check()
        for s in steps:
            if s.shard.world_size > 1:
                processes.all_reduce_gradients(list(trainable(s.model).values()), totals[s.run])
        return totals

    @torch.no_grad()
    def log_probabilities(self, waiting: Sequence[RunRows], check: Callable[[], None]) -> dict[int, list[Tensor]]:
        """What `nn.loss.log_probabilities` gives for each row of each run. check: as in `add_gradients`."""
        self.model.eval()
        found: dict[int, list[Tensor]] = {run.run: [] for run in waiting}
        joined = rows(waiting, micro_batch_tokens(self.row_tokens, self.model.device.type))
        for row in tqdm(joined, desc="evaluating", unit="passes", leave=False, delay=2, disable=None):
            check()
            spans, segments, inputs = self._joined(row)
            parts = [Part(run.run, span) for (run, _), span in zip(row, spans, strict=True)]
            with row[0][0].isolation.row(self.model, segments), parts_of_row(parts):
                values = log_probabilities(self.model, **inputs)
            for (run, _), own in zip(row, values.split([len(micro["keep"]) for _, micro in row]), strict=True):
                found[run.run].append(own)
        return found

    @torch.no_grad()
    def check(self, isolation: Isolation) -> None:
        """Compute a short row, to see that the model can do it. Raises ConfigError if it draws in a way that no run can own."""
        self.model.train()
        places = torch.arange(4)
        micro: MicroBatch = {
            "input_ids": places[None],
            "position_ids": places[None],
            "keep": places,
            "targets": places,
            "segments": [Segment(4, None)],
        }
        run = RunStep(self.runs[0], isolation, [micro], self.model, 4, Shard(0, 1))
        try:
            self._losses_of_row([(run, micro)], learn=False)
        except NotImplementedError as e:
            raise ConfigError(
                f"this model can't be trained with several configs at a time: {first_line(e)}. Train them one by one."
            ) from e
        if isinstance(self._dropout, BaseDropout) and not self._dropout.calls:
            self._dropout = nullcontext()

    def _losses_of_row(self, row: Sequence[tuple[RunStep, MicroBatch]], learn: bool = True) -> dict[int, Tensor]:
        """Compute a row, and its gradients if it is to `learn`; each run's loss, summed over its supervised tokens in the row.

        Raises:
            NotImplementedError: the model draws random numbers that are no run's.
        """
        spans, segments, inputs = self._joined(row)
        for s, _ in row:
            s.generators.start_row()
        parts = [Part(s.run, span, s.generators.drawing) for (s, _), span in zip(row, spans, strict=True)]
        counts = [len(micro["keep"]) for _, micro in row]
        outside = random_states()
        with row[0][0].isolation.row(self.model, segments), parts_of_row(parts), self._dropout:
            losses = supervised_losses(self.model, **inputs, counts=counts)
            means = [loss / max(1, s.total) for (s, _), loss in zip(row, losses, strict=True)]
            if learn:
                torch.stack(means).sum().backward()
        if any(not torch.equal(state, outside.get(kind, state)) for kind, state in random_states().items()):
            raise NotImplementedError("its layers draw random numbers themselves (layer drop, router noise)")
        return {s.run: loss.detach() for (s, _), loss in zip(row, losses, strict=True)}

    def _joined(
        self, row: Sequence[tuple[RunRows, MicroBatch]]
    ) -> tuple[list[slice], list[Segment], dict[str, Tensor]]:
        """The tokens of each micro-batch in the row, the row's segments, and what the model is given."""
        spans: list[slice] = []
        segments: list[Segment] = []
        token = 0
        for _, micro in row:
            first = len(segments)
            segments += [Segment(n, None if parent is None else parent + first) for n, parent in micro["segments"]]
            spans.append(slice(token, token := token + tokens_of(micro)))
        joined = {
            "input_ids": torch.cat([micro["input_ids"] for _, micro in row], 1),
            "position_ids": torch.cat([micro["position_ids"] for _, micro in row], 1),
            "keep": torch.cat([micro["keep"] + span.start for (_, micro), span in zip(row, spans, strict=True)]),
            "targets": torch.cat([micro["targets"] for _, micro in row]),
        }
        return spans, segments, {key: x.to(self.model.device, non_blocking=True) for key, x in joined.items()}


def _move_gradient(kept: Tensor, parameter: Tensor) -> None:
    """Move a new gradient to memory made before training: among the tensors of a row it would leave holes in the CPU's heap."""
    if parameter.grad is not None and parameter.grad is not kept:
        parameter.grad = kept.copy_(parameter.grad)


def check_joint(base: PreTrainedModel, adapted: Iterable[str], checkpointing: bool) -> None:
    """Refuse runs that can't be computed together on this base, of which they adapt these modules.

    Raises:
        ConfigError: they adapt experts; or the base has dropout of its own, and its layers are to be computed again.
    """
    if any(map(is_expert, adapted)):  # whose input is some of a row's tokens, in another order
        raise ConfigError("adapter.targets: runs that adapt experts can't be trained together. Train them one by one.")
    has_dropout = any(
        "drop" in key and isinstance(value, float) and value > 0
        for key, value in base.config.get_text_config().to_dict().items()
        if not key.startswith(("classifier_", "summary_"))  # of classification heads, which a language model lacks
    )
    if checkpointing and has_dropout:
        raise ConfigError(
            "train.gradient_checkpointing is not supported for several configs of a model that has dropout of its own. Set it "
            "to false, or train them one by one."
        )
