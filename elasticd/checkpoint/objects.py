"""Names in an object store, by fsspec, and what is asked of it: every error comes out as one of a few.

fsspec's file systems raise whatever their clients raise. Here a thing that is not there is FileNotFoundError, and all
else OSError with a text; a *read* that the store refuses is StoreUnavailable: an older checkpoint must not be taken,
and nothing begun afresh, because a network was down for a minute. fsspec's backends try again by themselves.

Not here: what a checkpoint is made of (object_storage.py), credentials (fsspec's own configuration).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elasticd.errors import ConfigError, StoreUnavailable

_NO_SUCH_OBJECT = "no such object"


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """The name of an object, or what the names of several begin with: as much of a Path as checkpoints need.

    ``key`` is the name as the file system knows it, without the protocol.
    """

    url: str
    key: str = field(compare=False, repr=False)
    fs: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}", f"{self.key}/{name}", self.fs)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.url.rpartition("/")[0], self.key.rpartition("/")[0], self.fs)

    def exists(self) -> bool:
        """Whether there is an object of this very name."""
        try:
            self.size_bytes()
        except FileNotFoundError:
            return False
        return True

    def size_bytes(self) -> int:
        """As the store says now: what fsspec remembers of listings is dropped."""
        with _reading(self):
            self.fs.invalidate_cache()
            found = self.fs.info(self.key)
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, _NO_SUCH_OBJECT, self.url)
        return int(found["size"])

    def read_bytes(self) -> bytes:
        with _reading(self):
            return bytes(self.fs.cat_file(self.key))

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fill the view from there on; how many bytes there were."""
        with _reading(self):
            found = self.fs.cat_file(self.key, start=offset, end=offset + len(view))
        view[: len(found)] = found
        return len(found)

    def write_bytes(self, content: bytes) -> None:
        """Put it in one piece. OSError unless the store then gives back these very bytes."""
        with writing(self):
            self.fs.pipe_file(self.key, content)
            found = bytes(self.fs.cat_file(self.key))
        if found != content:
            raise OSError(errno.EIO, f"{self.url} was put, and reads otherwise")

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError), writing(self):
            self.fs.rm_file(self.key)

    def below(self) -> dict[str, int]:
        """All objects below this prefix: their names from here on, and their sizes."""
        try:
            with _reading(self):
                self.fs.invalidate_cache()
                found = self.fs.find(self.key, detail=True)
        except FileNotFoundError:
            return {}
        start = self.key + "/"
        return {key.removeprefix(start): int(one["size"]) for key, one in found.items() if key.startswith(start)}


Location = Path | ObjectPath


def locate(given: str | os.PathLike[str]) -> Location:
    """A directory on a file system, or a prefix in an object store where a URL is given; ``file://`` is a directory.

    ConfigError when fsspec or its backend for this protocol is not installed, or does not take the URL.
    """
    text = os.fspath(given)
    if isinstance(given, Path) and given.parts and given.parts[0].endswith(":"):
        raise ConfigError(f"{text} was a URL before it was made a Path: give it as a text")
    protocol, is_url, rest = text.partition("://")
    if not is_url or isinstance(given, Path):
        return Path(text).absolute()
    if protocol in ("file", "local"):
        return Path(rest).absolute()  # with renames and flushes: better than what fsspec makes of it
    try:
        from fsspec.core import url_to_fs

        fs, key = url_to_fs(text, use_listings_cache=False)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"cannot keep checkpoints at {text}: {why}; "
            "pip install 'elasticd[objects]' and fsspec's package for that protocol (s3fs, gcsfs, ...)"
        ) from error
    if not key.strip("/"):
        raise ConfigError(f"cannot keep checkpoints at {text}: name a bucket, and a prefix in it")
    return ObjectPath(text.rstrip("/"), key.rstrip("/"), fs)


@contextlib.contextmanager
def writing(path: ObjectPath) -> Iterator[None]:
    """What the store's client raises, as FileNotFoundError or another OSError that has a text."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _NO_SUCH_OBJECT, path.url) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{path.url}: {error or type(error).__name__}") from error


@contextlib.contextmanager
def _reading(path: ObjectPath) -> Iterator[None]:
    try:
        with writing(path):
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"the object store refuses: {error.strerror}") from error


def remove_below(path: ObjectPath) -> None:
    """Remove all objects below. OSError when one stays."""
    for name in path.below():
        (path / name).remove()
