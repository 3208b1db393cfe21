"""An object store in memory that fails as a test tells it: fsspec's file system "flaky"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Flaky(MemoryFileSystem):
    """An object store in memory that fails as it is told."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as fsspec's own has it
    pseudo_dirs = [""]  # noqa: RUF012
    #: Called with the verb and the key before each call; may raise.
    before: Callable[[str, str], None] = staticmethod(lambda _verb, _key: None)
    #: Bytes that this one takes of a put: the rest is lost without a word.
    cut: Callable[[str], int | None] = staticmethod(lambda _key: None)
    #: Keys that a listing does not show yet, or still shows.
    hidden: Callable[[str], bool] = staticmethod(lambda _key: False)
    ghosts: dict[str, int] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        key = self._strip_protocol(path)
        Flaky.before("get" if mode == "rb" else "put", key)
        file = super()._open(path, mode, **more)
        if mode == "wb":
            write, plain_close = file.write, file.close

            def refusing(data: Any) -> int:
                Flaky.before("write", key)
                return write(data)

            def close() -> None:
                Flaky.before("complete", key)
                if (at := Flaky.cut(key)) is not None:
                    file.truncate(at)
                plain_close()

            file.write, file.close = refusing, close
        return file

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        key = self._strip_protocol(path)
        Flaky.before("put", key)
        super().pipe_file(path, value[: Flaky.cut(key)], **more)
        Flaky.before("answer", key)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        Flaky.before("get", self._strip_protocol(path))
        return super().cat_file(path, start, end, **more)

    def rm_file(self, path: str) -> None:
        Flaky.before("remove", self._strip_protocol(path))
        super().rm_file(path)

    def find(self, path: str, **more: Any) -> Any:
        Flaky.before("list", self._strip_protocol(path))
        found = {key: one for key, one in super().find(path, **more).items() if not Flaky.hidden(key)}
        return found | {key: {"name": key, "size": size, "type": "file"} for key, size in Flaky.ghosts.items()}


fsspec.register_implementation("flaky", Flaky, clobber=True)


def fail_on(verb: str, ending: str, error: Exception | None = None) -> list[str]:
    """Have calls with this verb fail on keys that end so; what was called."""
    called: list[str] = []

    def before(said: str, key: str) -> None:
        called.append(f"{said} {key}")
        if said == verb and key.endswith(ending):
            raise error or RuntimeError("the store says no")

    Flaky.before = staticmethod(before)
    return called


def heal() -> None:
    Flaky.before = staticmethod(lambda _verb, _key: None)
    Flaky.cut = staticmethod(lambda _key: None)
    Flaky.hidden = staticmethod(lambda _key: False)
    Flaky.ghosts = {}
