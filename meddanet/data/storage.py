"""Bytes from plain and gzip-compressed files, never more than they hold, and whole files back."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import igzip, igzip_lib, igzip_threaded

from .volume import VolumeError

# takes a path and its bytes, as `write_bytes` does
Writer = Callable[..., None]

_GZIP_MAGIC = b"\x1f\x8b"
# deflate cannot shrink further than 258 bytes to two bits
_MAX_RATIO = 1032
_CHUNK = 1 << 20
_SMALL = 64 << 20
# of compressed bytes, which may become a thousand times as many
_BLOCK = 1 << 14
_CURES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk",
    errno.EFBIG: "raise the limit of files' size, ulimit -f",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
    errno.EIO: "name a folder on another disk",
    errno.EXDEV: "name a folder on another disk",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
        "expected a writable folder",
    ),
}
# of file systems that cannot be told to put a file on disk
_NO_FSYNC = errno.EINVAL, errno.ENOTSUP


def read_head(path: Path, size: int) -> bytes:
    """Returns the first `size` decompressed bytes, fewer if the file is shorter.

    Raises:
        VolumeError: If the file cannot be read or decompressed.
    """
    with read_errors(path), (igzip.open if _is_gzip(path) else open)(path, "rb") as stream:
        return stream.read(size)


def read_bytes(path: Path, size: int) -> np.ndarray:
    """Returns the first `size` decompressed bytes, with the whole file's checksum verified.

    Memory is claimed only once it is known that the file holds as much.

    Raises:
        VolumeError: If the file holds fewer bytes, is truncated or fails its checksum.
    """
    with read_errors(path):
        compressed = _is_gzip(path)
        held = _decompressed_size(path, size) if compressed else path.stat().st_size
        if held < size:
            raise VolumeError(
                f"{path}: the header asks for {size} bytes but the file holds "
                f"{'at most ' if compressed else ''}{held}; expected a complete NIfTI file"
            )
        buffer = np.empty(size, np.uint8)
        with (igzip_threaded.open if compressed else open)(path, "rb") as stream:
            _fill(stream, buffer.data, path)
            if compressed:
                _count(stream)
    return buffer


def read_small(path: Path) -> bytes:
    """Returns what a file of some pages, such as a report, holds.

    Raises:
        OSError: If it cannot be read, is no regular file (a pipe has no end), or no small one.
    """
    with open(path, "rb", opener=_at_once) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        content = stream.read(_SMALL + 1)
    if len(content) > _SMALL:
        raise OSError(errno.EFBIG, f"is larger than {_SMALL >> 20} MiB", str(path))
    return content


def _at_once(path: str, flags: int) -> int:
    # a pipe that nobody writes to would be waited for; Windows has neither
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class Staged:
    """Files that appear under their names together, when all of them are complete and on disk.

    Leaving its context removes what has not appeared.

    Attributes:
        partials: Where each file lies until then.
    """

    def __init__(self) -> None:
        self.partials: dict[Path, Path] = {}

    def write(self, path: Path, *parts: bytes | memoryview) -> None:
        """Writes a file beside its name.

        Raises:
            VolumeError: If it cannot be written.
        """
        # two containers that share a folder may have the same process number
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        with write_errors(path), open(partial, "xb") as stream:
            self.partials[path] = partial
            stream.writelines(parts)
            stream.flush()
            _put_on_disk(stream)

    def appear(self) -> None:
        """Puts the files under their names, in the order in which they were written.

        Raises:
            VolumeError: If one cannot be replaced.
        """
        for path, partial in self.partials.items():
            with write_errors(path):
                os.replace(partial, path)

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        for partial in self.partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _put_on_disk(stream: BinaryIO) -> None:
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file that appears under its name only when it is complete and on disk.

    Raises:
        VolumeError: If it cannot be written.
    """
    with Staged() as staged:
        staged.write(path, *parts)
        staged.appear()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is written into a VolumeError that names it and a cure."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "try again, or another folder")
        raise VolumeError(
            f"{path}: cannot be written ({error.strerror or error}); {cure}"
        ) from error


def read_record(path: Path, cure: str) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: The file.
        cure: What to do where it is damaged.

    Raises:
        VolumeError: If it is damaged.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise VolumeError(f"{path}: is damaged ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise VolumeError(f"{path}: holds no record; {cure}")
    return content


def write_json(content: dict, path: Path, write: Writer = write_bytes) -> None:
    """Writes JSON that appears under its name only when complete; one line per entry.

    Raises:
        VolumeError: If the file cannot be written.
    """
    write(path, (_lines(content, 0) + "\n").encode())


def _lines(content: object, depth: int) -> str:
    """Breaks the outer two levels of dicts into lines, and leaves the long lists on theirs."""
    if not isinstance(content, dict) or not content or depth == 2:
        return json.dumps(content)
    indent = "  " * (depth + 1)
    rows = [f"{indent}{json.dumps(k)}: {_lines(v, depth + 1)}" for k, v in content.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent[2:]}}}"


def compress(*parts: bytes | memoryview) -> bytes:
    """Returns the parts as one gzip member without a time stamp: equal input, equal bytes."""
    return igzip.compress(b"".join(parts), compresslevel=1, mtime=0)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a VolumeError that names it and a cure."""
    try:
        yield
    # isal's stub forgets that IsalError is a class
    except (EOFError, igzip.BadGzipFile, igzip_lib.IsalError) as error:  # type: ignore[misc]
        raise VolumeError(f"{path}: {_gzip_fault(path, error)}") from error
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror or error})") from error


def _gzip_fault(path: Path, error: Exception) -> str:
    """Returns what is wrong with a gzip file that could not be read to its end."""
    size = path.stat().st_size
    if whole := _whole_gzip(path):
        return (
            f"{size - whole} bytes that are no gzip data follow it; expected none, it is complete "
            f"without: cut the file to {whole} bytes"
        )
    if isinstance(error, EOFError):
        return "the gzip data is truncated; expected a complete file, copy it again"
    return f"the gzip data is damaged ({error}); expected an intact file, copy it again"


def _whole_gzip(path: Path) -> int:
    """Returns the length of the complete gzip members that a file begins with, 0 if one is not."""
    end = 0
    with suppress(zlib.error), open(path, "rb") as stream:
        while stream.read(2) == _GZIP_MAGIC:
            stream.seek(end)
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                if not (block := stream.read(_BLOCK)):
                    return 0
                member.decompress(block)
            end = stream.tell() - len(member.unused_data)
            stream.seek(end)
        return end
    return 0


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(2) == _GZIP_MAGIC


def _decompressed_size(path: Path, wanted: int) -> int:
    """Returns how many bytes a gzip file holds; only an upper bound where that settles it."""
    bound = _MAX_RATIO * path.stat().st_size
    if bound < wanted:
        return bound
    with open(path, "rb") as stream:
        stream.seek(-4, os.SEEK_END)
        stated = int.from_bytes(stream.read(4), "little")
    if stated == wanted:
        return stated
    # several members, over 4 GiB, trailing bytes or damage: only counting tells
    with igzip.open(path, "rb") as stream:
        return _count(stream)


def _count(stream: BinaryIO) -> int:
    chunk, total = bytearray(_CHUNK), 0
    while read := stream.readinto(chunk):  # type: ignore[attr-defined]
        total += read
    return total


def _fill(stream: BinaryIO, target: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(target):
        read = stream.readinto(target[filled:])  # type: ignore[attr-defined]
        if not read:
            raise VolumeError(f"{path}: ends after {filled} bytes, expected {len(target)}")
        filled += read
