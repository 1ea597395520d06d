"""The files of a base model on this machine: where they are, which hold the weights, and what identifies them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_ft.core.errors import ModelError, is_out_of_memory
from lora_ft.core.names import is_local, with_slashes
from lora_ft.core.paths import local_path, refuse_hollow, refuse_not_utf8, refuse_special
from lora_ft.core.storage import read_json
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.model.hub import cached, cached_commit, snapshot
from lora_ft.model.tensor_file import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX, PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
PERMISSIONS = "Check its permissions and those of its folder."
# no pickles (unless allowed), no other frameworks
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Base:
    """A base model's files on this machine, and what the user trusts about them.

    name: as the user wrote it. revision: the commit of a hub model. gguf: the .gguf file, if the base is one. pickles:
    pickled weight files that the user has allowed. trusted_code: whether Python code in the folder may run. new_tokens: that a
    run adds to the model and its tokenizer (model/new_tokens.py).
    """

    name: str
    folder: Path
    revision: str | None = None
    gguf: Path | None = None
    pickles: tuple[Path, ...] = ()
    trusted_code: bool = False
    new_tokens: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes, dtypes and strided samples of every tensor's bytes. Raises as `weight_files`.

        It depends on the files and new tokens alone: sharding, loading dtype and quantization on load don't change it.
        """
        if self.new_tokens:
            return digest([replace(self, new_tokens=()).fingerprint, self.new_tokens])
        if self.gguf:
            return digest([["gguf", self.gguf.stat().st_size, _sample(self.gguf, 0, self.gguf.stat().st_size)]])
        if self.pickles:
            return digest([["pickle", p.stat().st_size, _sample(p, 0, p.stat().st_size, 2**12)] for p in self.pickles])
        tensors = [
            [name, stored.dtype, stored.shape, _sample(stored.path, stored.start, stored.end - stored.start)]
            for path in weight_files(self)
            for name, stored in read_header(path).items()
        ]
        return digest(sorted(tensors))


def resolve(name: str, revision: str | None = None, trust: Trust = NO_TRUST) -> Base:
    """Find the files of a hub id, a local folder or a .gguf file. A local name is never looked up on the network.

    Raises:
        ModelError: no such folder, no model in it, or a hub that can't be reached or refuses.
    """
    name = with_slashes(name)
    try:
        base = _local(name) if is_local(name) else _hub(name, revision, trust.pickles)
        _check_readable(base)
    except OSError as e:
        raise ModelError(f"model {name}: {e.filename or name} can't be read ({e.strerror}). {PERMISSIONS}") from e
    unpickle = trust.pickles and not base.gguf and not _has_safetensors(base.folder)
    pickles = tuple(_listed(base.folder, PICKLE_INDEX, PICKLE)) if unpickle else ()
    return replace(base, pickles=pickles, trusted_code=trust.remote_code)


def on_this_machine(name: str, revision: str | None = None) -> Base | None:
    """As `resolve`, but a hub id is only looked for in the cache: nothing is downloaded. None if it is not there."""
    try:
        if is_local(name):
            return resolve(name)
        folder = cached(name, revision, WANTED)
    except ModelError:
        return None
    return Base(name, folder, revision=folder.name) if folder and _is_complete(folder) else None


def _local(name: str) -> Base:
    path = local_path(name)
    refuse_not_utf8(path, ModelError)
    refuse_special(path, ModelError)
    if not os.path.lexists(path):
        hint = "Give a folder with config.json, a .gguf file or a hub id."
        raise ModelError(f"model {name}: no such file or folder. {hint}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name}: a file that isn't .gguf. Give the folder that holds config.json.")
        return Base(name, path.parent, gguf=path)
    if not (path / "config.json").exists():
        hint = " It holds an adapter: name its base model instead." if (path / "adapter_config.json").exists() else ""
        raise ModelError(f"model {name}: no config.json in that folder.{hint}")
    return Base(name, path)


def _hub(name: str, revision: str | None, pickles: bool) -> Base:
    """The model in the hub's cache, downloaded if necessary."""
    folder = cached_commit(name, revision, WANTED)
    if folder is None or not _is_complete(folder):
        folder = snapshot(name, revision, WANTED)
        if pickles and not _has_safetensors(folder):
            folder = snapshot(name, revision, [*WANTED, f"{PICKLE.removesuffix('.bin')}*.bin"])
    return Base(name, folder, revision=folder.name)  # the cache names folders by commits


def _is_complete(folder: Path) -> bool:
    """Whether a folder has the config, the tokenizer and all weights of a model."""
    try:
        weights = _listed(folder, INDEX, SINGLE) or _listed(folder, PICKLE_INDEX, PICKLE)
    except ModelError:
        return False
    tokenizer = any(folder.glob(pattern) for pattern in ("tokenizer*", "vocab*"))
    return bool(weights) and tokenizer and (folder / "config.json").is_file()


def _check_readable(base: Base) -> None:
    """Raise an error for a file that can't be read, or that is none: libraries report it as missing, or wait for it."""
    for path in sorted(base.folder.iterdir()) if base.gguf is None else [base.gguf]:
        if base.gguf or any(fnmatch(path.name, pattern) for pattern in (*WANTED, PICKLE)):
            refuse_special(path, ModelError)
            refuse_hollow(path, ModelError)
            if path.is_file() and not os.access(path, os.R_OK):
                raise ModelError(f"model {base.name}: {path} can't be read (Permission denied). {PERMISSIONS}")


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def weight_files(base: Base) -> list[Path]:
    """The base's safetensors files, in the order of the index.

    Raises:
        ModelError: there are none (pickles don't count), or one is missing, damaged or outside the folder.
    """
    if not (files := _listed(base.folder, INDEX, SINGLE)):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in base.folder.glob(pattern))
        why = f"only pickled weights ({pickles[0]}), which can run code when read" if pickles else "no safetensors"
        raise ModelError(
            f"model {base.name}: {why}; {SINGLE} or {INDEX} is needed in {base.folder}. If its weights are a "
            f"{PICKLE} that you trust, add --allow-pickle: torch's weights_only loader reads it."
        )
    for path in files:
        with opened(path, "numpy"):  # which imports no torch
            pass
    return files


def _listed(folder: Path, index_name: str, single: str) -> list[Path]:
    """The weight files listed by an index, or the single file; [] if there is neither."""
    index = folder / index_name
    if not index.is_file():
        return [folder / single] if (folder / single).is_file() else []
    try:
        names = list(dict.fromkeys(read_json(index, ModelError)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{index}: not a weights index ({e!r}).") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: the file name {name!r} leads out of the folder.")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing, though {index_name} lists it. Copy the model again.")
    if (folder / single).is_file() and single not in names:
        raise ModelError(
            f"{index}: lists other weights than the {single} beside it. Remove those that are not the model's."
        )
    return [folder / name for name in names]


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[safe_open]:
    """Open a safetensors file lazily; raises ModelError if it can't be read, its header is damaged or it is truncated."""
    try:
        with path.open("rb"):  # safetensors calls any file that it can't open missing
            pass
    except OSError as e:
        raise ModelError(f"{path}: can't be read ({e.strerror}).") from e
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as e:
        if is_out_of_memory(e):
            raise
        raise ModelError(f"{path}: damaged or truncated ({e}). Copy the file again.") from e


def digest(obj: object) -> str:
    """SHA-256, in hex, of an object as JSON."""
    return hashlib.sha256(json.dumps(obj).encode()).hexdigest()


def _sample(path: Path, start: int, size: int, pieces: int = 64, piece: int = 64) -> str:
    """Hash of evenly spread pieces of `piece` bytes, the last one included (of all bytes if there are few)."""
    if size <= pieces * piece:
        pieces, piece = 1, size
    sha256 = hashlib.sha256()
    with path.open("rb") as f:
        for i in range(pieces):
            f.seek(start + i * (size - piece) // max(pieces - 1, 1))
            sha256.update(f.read(piece))
    return sha256.hexdigest()
