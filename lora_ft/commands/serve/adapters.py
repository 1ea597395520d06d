"""Adapters that come and go while the server runs, from below one folder."""

import asyncio
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from lora_ft.commands.generate.prompts import PromptFormat, prompt_format
from lora_ft.commands.generate.serving import Served
from lora_ft.commands.serve.bodies import ApiError, LoadBody
from lora_ft.commands.serve.engine import Engine
from lora_ft.core.errors import UserError
from lora_ft.core.messages import printable
from lora_ft.methods.lora.files import adapter_layers
from lora_ft.methods.lora.multi import add_adapter, is_expert, remove_adapter, shared_layers
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained
from lora_ft.nn.lora import LoRALinear


async def load_lora_adapter(
    served: Served, engine: Engine, folder: Path, body: LoadBody, taken: set[str], worker: Executor
) -> None:
    """Load an adapter by name. Its files are read beside the engine, which stops only to take it over."""
    name = body.lora_name
    if name in {*taken, *served.names}:
        raise ApiError(400, f"there is a model {name} already", "lora_name")
    if not engine.together:
        raise ApiError(400, "this model can't compute several adapters at once", "lora_name")
    path = inside(folder, body.lora_path)
    try:
        form, layers = await asyncio.get_running_loop().run_in_executor(worker, partial(_read, path, served))

        def take_over() -> None:
            if name in served.names:
                raise ApiError(400, f"there is a model {name} already", "lora_name")
            add_adapter(served.model, name, layers)
            served.formats[name] = form

        await asyncio.wrap_future(engine.call(take_over))
    except UserError as e:  # without the place of the folder
        raise ApiError(400, str(e).replace(str(path), body.lora_path), "lora_path") from e


async def unload_lora_adapter(served: Served, engine: Engine, name: str) -> None:
    """Forget an adapter: 404 if there is none of the name, 409 while requests use it."""

    def forget() -> None:
        if name not in served.names:
            raise ApiError(404, f"no adapter {printable(name, 100)}", "lora_name", "model_not_found")
        if not served.by_name:
            raise ApiError(400, "the adapter of this server can't be unloaded", "lora_name")
        if any(job.adapter == name for job in engine.jobs()):
            raise ApiError(409, f"requests for {name} are running: try again later", "lora_name")
        engine.batch.leave_mix()
        remove_adapter(served.model, name)
        engine.beginnings.forget(name)
        del served.formats[name]

    await asyncio.wrap_future(engine.call(forget))


def inside(folder: Path, given: str) -> Path:
    """A path below the folder, given relative to it or in full; ApiError for any other, also by links or `..`."""
    try:
        path = (folder / given).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_dir():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a null character, links in a circle
        pass
    raise ApiError(400, "lora_path: no such folder below the server's folder of adapters", "lora_path")


def _read(path: Path, served: Served) -> tuple[PromptFormat, dict[str, LoRALinear]]:
    trained = Trained.open(path)
    if trained.alone:
        raise ApiError(400, f"{trained.alone}; only LoRA adapters share a base", "lora_path")
    trained.check(served.base, served.tokenizer, other_base=False)
    adapter = read_adapter(trained)
    known = shared_layers(served.model)
    if any(is_expert(module) for module in adapter.tensors) or any(map(is_expert, known)):
        raise ApiError(400, "an adapter of experts can't share a batch", "lora_path")
    form = prompt_format(trained.config, served.tokenizer, raw=False, other=served.formats[None])
    return form, adapter_layers(served.model, adapter)
