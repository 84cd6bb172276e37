"""The fields of a protocol buffer message, without a schema."""

from collections.abc import Iterator

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields number and value of each field, in order: integers of variable length as int, all others as bytes.

    Raises:
        ValueError: the bytes are not a message, or end within one.
    """
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        kind = tag & 7
        if kind == VARINT:
            value, offset = _varint(message, offset)
            yield tag >> 3, value
            continue
        if kind == DELIMITED:
            length, offset = _varint(message, offset)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"field {tag >> 3} is of an unknown kind {kind}")
        if offset + length > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[offset : offset + length]
        offset += length


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if offset >= len(message) or shift > 63:
            raise ValueError("it ends within a number")
        byte = message[offset]
        value |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 128:
            return value, offset
