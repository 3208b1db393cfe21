"""etcd's protobuf messages, taken from the installed etcd3 package without importing it.

``import etcd3`` fails with protobuf 4 and later, since its generated modules build their descriptors by hand. Those
modules also carry each file descriptor whole, as one serialized literal: it is read out of the source with ``ast``
(nothing is executed) and loaded into a *private* descriptor pool, so that another etcd client in the same process,
which registers ``kv.proto`` in the default pool, does not collide with us. No generated code in our tree, no pin on
protobuf; but the shape of those files matters, hence the pin on etcd3.

Not here: channels and calls (etcd_link.py), the store's semantics (etcd.py).
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from elasticd.errors import OperatorError

# In the order of their imports: rpc.proto names the other two.
_FILES = ("kv_pb2.py", "auth_pb2.py", "rpc_pb2.py")
_INSTALL = "pip install etcd3==0.12.0"


@cache
def message(full_name: str) -> Any:
    """The message class of that name, such as ``etcdserverpb.RangeRequest``. Raises KeyError for an unknown one."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(full_name))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    folder = _definitions_folder()
    for name in _FILES:
        file = descriptor_pb2.FileDescriptorProto()
        file.ParseFromString(_serialized_descriptor(folder / name))
        pool.Add(file)  # type: ignore[no-untyped-call, unused-ignore]
    return pool


def _definitions_folder() -> Path:
    # find_spec of a top-level package does not execute it.
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        raise OperatorError(f"the package etcd3, whose message definitions are needed, is not installed: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "etcdrpc"


def _serialized_descriptor(source: Path) -> bytes:
    """The argument of ``serialized_pb=_b('...')``: a string of latin-1 code points, one a byte."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OperatorError(f"etcd's message definitions cannot be read: {error}; {_INSTALL}") from error
    for line in lines:
        # Only that line is parsed: the rest of the file is 200 kB, and parsing it takes longer than all else here.
        if line.lstrip().startswith("serialized_pb=_b("):
            call = ast.parse(f"dict({line.strip().rstrip(',')})", mode="eval").body
            assert isinstance(call, ast.Call)
            literal = call.keywords[0].value
            assert isinstance(literal, ast.Call)
            return str(ast.literal_eval(literal.args[0])).encode("latin-1")
    raise OperatorError(f"{source} is not of the form that etcd3 0.12.0 has: {_INSTALL}")
