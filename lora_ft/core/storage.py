"""Writing files atomically, and reading files that may be damaged or forged.

Every file is written under a temporary name, synced and renamed: after a crash a name has its old content or the new one,
never half of one. File modes follow the umask.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from lora_ft.core.disk import WINDOWS, os_errors_as_files_error, rename, sync, where_supported
from lora_ft.core.errors import FilesError, ModelError, UserError, is_out_of_memory
from lora_ft.core.messages import format_value, json_text, printable
from lora_ft.core.paths import refuse_hollow, refuse_not_utf8, refuse_special

NOT_UTF8 = "backslashreplace"  # other bytes of a file's name become \udcXX, which JSON reads back as the same name
JSON_LIMIT = 16 * 2**20  # bytes; the largest JSON file of a model, its weight index, has a few MiB


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically.

    Raises:
        FilesError: the folder is missing, read-only or full (with the bytes needed and free).
    """
    content = data.encode(errors=NOT_UTF8) if isinstance(data, str) else data
    with atomic_file(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, obj: object) -> None:
    """Write indented JSON, keys in the order given, with a final newline. Raises as `write_file`."""
    write_file(path, json_text(obj, indent=2) + "\n")


def append_line(path: Path, obj: object) -> None:
    """Append one line of JSON in a single write, so that readers never see half of one. Raises as `write_file`."""
    refuse_special(path, FilesError)
    line = (json_text(obj) + "\n").encode(errors=NOT_UTF8)
    with os_errors_as_files_error(path, len(line)), path.open("ab", buffering=0) as f:
        f.write(line)


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory as safetensors, atomically, without a copy. Raises as `write_file`."""
    from safetensors.torch import save_file

    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_file(path, needed) as temporary:
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata or {"format": "pt"})  # replaces the file by one of mode 0600
        with where_supported():
            temporary.chmod(mode & 0o777)


def read_tensors(path: Path) -> dict:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: the file is missing, truncated or hollow, or its header is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_hollow(path, ModelError)
    try:
        tensors = load_file(path)
        # Windows neither replaces nor removes a file that is mapped
        return {name: tensor.clone() for name, tensor in tensors.items()} if WINDOWS else tensors
    except (SafetensorError, OSError) as e:
        if is_out_of_memory(e):
            raise
        raise ModelError(f"{path}: missing, damaged or truncated ({e}). Copy the file again.") from e


def read_json(path: Path, error: type[UserError]) -> dict:
    """A JSON object from an untrusted file: neither its size nor its depth can exhaust memory or the stack.

    Raises:
        error: the file is missing, too large, too deep, not JSON, or not an object.
    """
    refuse_special(path, error)
    try:
        with path.open("rb") as f:
            content = f.read(JSON_LIMIT + 1)
        if len(content) > JSON_LIMIT:
            raise error(f"{path}: larger than {JSON_LIMIT // 2**20} MiB, the limit for JSON files.")
        obj = json.loads(content)
    except OSError as e:
        raise error(f"{path}: can't be read ({e.strerror}).") from e
    except RecursionError as e:
        raise error(f"{path}: nested too deeply.") from e
    except ValueError as e:
        raise error(f"{path}: not valid JSON ({e}).") from e
    if not isinstance(obj, dict):
        raise error(f"{path}: holds a {type(obj).__name__} where an object {{...}} is expected.")
    return obj


def wrong_entries(obj: dict, types: Mapping[str, Any]) -> list[str]:
    """The names in `types`, `a.b` for an entry of an entry, that `obj` lacks or has with another type."""

    def fits(name: str, kind: Any) -> bool:
        value: Any = obj
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

    return [name for name, kind in types.items() if not fits(name, kind)]


def refuse_existing(target: Path) -> None:
    """Raise FilesError if a folder can't be made there because there is something, or its name is not UTF-8."""
    refuse_not_utf8(target, FilesError)
    if target.exists() or target.is_symlink():
        raise FilesError(f"{target}: exists already. Remove it or name another folder.")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling folder to fill; on success it is synced and renamed to `target`, after an exception removed.

    What a killed process left behind is removed by the next one with the same target.

    Raises:
        FilesError: `target` exists, its name is not UTF-8, or its parent can't be written.
    """
    refuse_existing(target)
    with os_errors_as_files_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target, "partial")
        staged = target.parent / f".{target.name}.partial-{os.getpid()}"
        staged.mkdir()
    try:
        yield staged
        with os_errors_as_files_error(target):
            for path in (*staged.rglob("*"), staged):
                sync(path)
            if target.exists():  # rename would silently replace an empty folder
                raise FilesError(f"{target}: another process created it in the meantime. Name another folder.")
            rename(staged, target)
            sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sibling(folder: Path, suffix: str) -> Path:
    """The path beside `folder` whose name is its name plus `suffix`."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(named.name + suffix)


def require_space(folder: Path, needed: int) -> None:
    """Raise FilesError, with both figures, unless `needed` bytes fit on the disk of `folder`, which need not exist yet."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FilesError(f"{folder}: {needed} bytes needed, {free} free. Free some space or name another folder.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Size in bytes and SHA-256 of files in `folder`, by name."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def verify_manifest(folder: Path, entries: dict, error: type[UserError]) -> None:
    """Check that every listed file exists unchanged. A name without size and hash is not read.

    Raises:
        error: a file is missing or changed, or a name leads out of the folder (checked before any file is read).
    """
    if not isinstance(entries, dict):
        raise error(f"{folder}: its manifest is not a table of files.")
    for name in entries:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise error(f"{folder}: its manifest names {name!r}, which leads out of the folder.")
    for name, entry in entries.items():
        if not entry:
            continue
        path = folder / name
        refuse_hollow(path, error)
        try:
            size = path.stat().st_size if isinstance(entry, dict) and path.is_file() else None
            digest = sha256(path) if size is not None and size == entry["size"] else None
        except (OSError, ValueError, KeyError):  # an impossible file name, or the disk fails
            size = None
        if size is None:
            name = printable(str(path), 500)
            raise error(f"{name}: missing or unreadable, though the manifest lists it. Restore it from a copy.")
        if size != entry["size"] or digest != entry.get("sha256"):
            change = "its SHA-256 differs" if digest else f"{size} bytes, was {format_value(entry['size'])}"
            raise error(f"{path}: changed since its manifest was written ({change}).")


@contextmanager
def atomic_file(path: Path, needed: int) -> Iterator[Path]:
    """A temporary file for about `needed` bytes, on success synced and renamed to `path`. Raises as `write_file`.

    What a killed process left behind is removed by the next one with the same path.
    """
    refuse_special(path, FilesError)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    with os_errors_as_files_error(path, needed):
        _remove_leftovers(path, "tmp")
        try:
            temporary.write_bytes(b"")
            yield temporary
            sync(temporary)
            rename(temporary, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path, kind: str) -> None:
    """Remove the partial folders, or temporary files, of `target` whose process is gone."""
    leftover = re.compile(re.escape(f".{target.name}.{kind}-") + r"(\d{1,9})", re.ASCII)
    with suppress(OSError):  # a folder that can be written but not listed
        for path in target.parent.iterdir():
            pid = leftover.fullmatch(path.name)
            if pid and (int(pid[1]) == os.getpid() or not psutil.pid_exists(int(pid[1]))):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
