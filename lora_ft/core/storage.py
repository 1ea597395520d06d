"""How files land and how they are read back.

Everything lands by write-to-temporary, fsync, rename: after a crash a name stands for the old content or the new, never
for half of one. Modes follow the umask. What is read is checked before it is believed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from lora_ft.core.errors import FilesError, ModelError, UserError, is_memory
from lora_ft.core.messages import format_value, printable

JSON_LIMIT = 16 * 2**20  # bytes; the largest honest file here, the index of a big model, has a few


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file in one step.

    Raises:
        FilesError: the folder is missing, read-only or full (with the bytes needed and free).
    """
    content = data.encode() if isinstance(data, str) else data
    with landing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, obj: object) -> None:
    """Write JSON as people and diffs like it: indented, in the order given, with a final newline."""
    write_file(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, obj: object) -> None:
    """Append one line of JSON in a single write, so that a reader, or a crash, never meets half of one.

    Raises:
        FilesError: as `write_file`.
    """
    line = (json.dumps(obj, ensure_ascii=False) + "\n").encode()
    with _as_files_error(path, len(line)):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file straight from the tensors' memory (contiguous, sharing none); no copy is made."""
    from safetensors.torch import save_file

    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    with landing(path, needed) as temporary:
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata or {"format": "pt"})  # puts a file of mode 0600 in the place of ours
        temporary.chmod(mode & 0o777)


def read_tensors(path: Path) -> dict:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: missing, cut short, or with a damaged header.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        if is_memory(e):
            raise
        raise ModelError(f"{path}: missing, damaged or cut ({e}). Copy the file again.") from e


def read_json(path: Path, error: type[UserError]) -> dict:
    """A JSON object from a file that may have come from anywhere: its size and depth cost nothing.

    Raises:
        error: missing, too large, too deep, not JSON, or not an object.
    """
    try:
        with path.open("rb") as f:
            content = f.read(JSON_LIMIT + 1)
        if len(content) > JSON_LIMIT:
            raise error(f"{path}: larger than {JSON_LIMIT // 2**20} MiB, so not a file that this tool can use.")
        obj = json.loads(content)
    except OSError as e:
        raise error(f"{path}: can't be read ({e.strerror}).") from e
    except RecursionError as e:
        raise error(f"{path}: nested too deeply to be an honest file.") from e
    except ValueError as e:
        raise error(f"{path}: not valid JSON ({e}).") from e
    if not isinstance(obj, dict):
        raise error(f"{path}: holds a {type(obj).__name__} where an object {{...}} is expected.")
    return obj


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling to fill; at the end it is made durable and takes the name `target`, in one step.

    After an exception it is removed; what a killed process left behind is removed by the next one with the same target.

    Raises:
        FilesError: `target` exists, or the place can't be written.
    """
    if target.exists() or target.is_symlink():
        raise FilesError(f"{target}: exists already. Remove it or name another folder.")
    with _as_files_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        staged = target.parent / f".{target.name}.partial-{os.getpid()}"
        staged.mkdir()
    try:
        yield staged
        with _as_files_error(target):
            for folder, _, names in os.walk(staged):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if target.exists():  # rename would silently take the place of an empty folder
                raise FilesError(f"{target}: made by someone else in the meantime. Name another folder.")
            staged.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sibling(folder: Path, suffix: str) -> Path:
    """The path beside `folder` whose name is its name plus `suffix`."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(named.name + suffix)


def require_space(folder: Path, needed: int) -> None:
    """FilesError with both figures if `needed` bytes don't fit where `folder` is, or will be made."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FilesError(f"{folder}: {needed} bytes needed, {free} free. Free some space or name another place.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Size in bytes and SHA-256 of each of these files."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def verify_manifest(folder: Path, entries: dict, error: type[UserError]) -> None:
    """Check that every listed file is there and unchanged. A name without size and hash is a mere mention.

    Raises:
        error: one is missing or changed, or a name leads out of the folder (then nothing was read).
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
        try:
            size = path.stat().st_size if isinstance(entry, dict) and path.is_file() else None
            hashed = sha256(path) if size is not None and size == entry["size"] else None
        except (OSError, ValueError, KeyError):  # no such name can be, or the disk fails
            size = None
        if size is None:
            raise error(
                f"{printable(str(path), 500)}: missing or unreadable, though the manifest lists it. Restore it from a copy."
            )
        if size != entry["size"]:
            raise error(
                f"{path}: changed since its manifest was written ({size} bytes, was {format_value(entry['size'])})."
            )
        if hashed != entry.get("sha256"):
            raise error(f"{path}: changed since its manifest was written (its SHA-256 differs).")


@contextmanager
def landing(path: Path, needed: int) -> Iterator[Path]:
    """An empty file with the umask's mode beside `path`, to fill; at the end it becomes `path`, made durable."""
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    with _as_files_error(path, needed):
        try:
            temporary.write_bytes(b"")
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _as_files_error(path: Path, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        wrapped = re.search(r"\(os error (\d+)\)", str(e))  # safetensors hides the system's error in one of its own
        number = e.errno if isinstance(e, OSError) else int(wrapped[1]) if wrapped else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            figures = f"{needed} bytes needed, {free} free" if needed else f"{free} bytes free"
            raise FilesError(f"{path}: the disk is full ({figures}). Free some space and run again.") from e
        if number is not None:
            raise FilesError(f"{path}: can't be written ({os.strerror(number)}).") from e
        raise


def _remove_leftovers(target: Path) -> None:
    prefix = f".{target.name}.partial-"
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:
                pass  # alive, and someone else's
            else:
                if int(pid) == os.getpid():
                    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
