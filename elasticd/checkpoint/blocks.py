"""Checksums of the pieces of a data file, so that whoever needs a part of it reads and checks that part alone. Pure.

A data file is cut into blocks: at the borders of DCP's items, at those of the bytes of a large tensor within its item,
and every 4 MiB inside of those. The index of the blocks is at the file's end, behind everything that DCP's metadata
points to, so DCP never sees it. The manifest says how long the index is, and what its checksum is.

Not here: reading and writing (disk.py, reader.py).
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from elasticd.errors import CheckpointInvalid

#: Small enough for the checksum to find in the processor's cache what was just read; a multiple of every element size.
BLOCK_BYTES = 4 * 1024 * 1024

_RECORD = struct.Struct("<III")  # size, checksum, flags
_TENSOR = 1

#: The reflected polynomial of zlib's CRC32.
_POLYNOMIAL = 0xEDB88320


@dataclass(frozen=True, slots=True)
class Block:
    """``of_tensor``: nothing but elements of a tensor, in row-major order."""

    start: int
    size_bytes: int
    crc32: int
    of_tensor: bool = False

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


def encode_index(blocks: Iterable[Block]) -> bytes:
    return b"".join(_RECORD.pack(one.size_bytes, one.crc32, _TENSOR * one.of_tensor) for one in blocks)


def decode_index(content: bytes | bytearray) -> list[Block]:
    """The blocks, without gaps from the start of the file. CheckpointInvalid when it is no index."""
    if len(content) % _RECORD.size:
        raise CheckpointInvalid("the index of blocks is cut short")
    blocks, start = [], 0
    for size_bytes, crc32, flags in _RECORD.iter_unpack(content):
        blocks.append(Block(start, size_bytes, crc32, of_tensor=bool(flags & _TENSOR)))
        start += size_bytes
    return blocks


def between(blocks: Sequence[Block], start: int, end: int) -> Sequence[Block]:
    """The blocks that the bytes from ``start`` up to ``end`` are in: these may begin earlier, and end later."""
    first = bisect_right(blocks, start, key=lambda block: block.end)
    last = first
    while last < len(blocks) and blocks[last].start < end:
        last += 1
    return blocks[first:last]


def cut(view: memoryview) -> Iterator[memoryview]:
    """In pieces of a block's size at most."""
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]


def checksum_of(blocks: Iterable[Block]) -> int:
    """The CRC32 of all of them one after the other, without their bytes."""
    whole = 0
    for block in blocks:
        whole = join_checksums(whole, block.crc32, block.size_bytes)
    return whole


def join_checksums(first: int, second: int, second_bytes: int) -> int:
    """The CRC32 of two texts one after the other, from theirs: zlib's crc32_combine, which Python does not show."""
    return _times(_shift_by(second_bytes), first) ^ second


def _times(a: int, b: int) -> int:
    """a * b modulo the polynomial, coefficients in reflected order."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _shift_by(size_bytes: int) -> int:
    """x ** (8 * size_bytes) modulo the polynomial, by squaring."""
    power, square = 0x80000000, 0x00800000  # 1, and x ** 8
    while size_bytes:
        if size_bytes & 1:
            power = _times(square, power)
        square = _times(square, square)
        size_bytes >>= 1
    return power


def checked(content: bytes | bytearray | memoryview, crc32: int, what: str) -> None:
    """CheckpointInvalid when these are not the bytes that were written."""
    if zlib.crc32(content) != crc32:
        raise CheckpointInvalid(f"{what} does not match its checksum")
