"""Image files -> the XMP that they carry. Reads PNG, JPEG, WebP and AVIF by their structure, and trusts none of it."""

from __future__ import annotations

import re
import zlib
from typing import Literal

MAX_XMP_BYTES = 64 << 20
"""More than any request can say: 64 prompts of 10,000 characters, each written as 12 ASCII ones."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"


class ContainerError(Exception):
    """The bytes are no image file of these formats, or a damaged one."""


def xmp_packets(file: bytes) -> list[bytes]:
    """The file's XMP: none, the packet, or, in a JPEG, the packet and its extension. Raises ContainerError."""
    if file.startswith(_PNG_SIGNATURE):
        return _png(file)
    if file.startswith(b"\xff\xd8"):
        return _jpeg(file)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return _webp(file)
    if file[4:8] == b"ftyp":
        return _avif(file)
    raise ContainerError("it is no PNG, JPEG, WebP or AVIF file")


class _Reader:
    """Numbers and bytes of a file, one after the other, up to `end`."""

    def __init__(self, file: bytes, position: int = 0, end: int | None = None) -> None:
        self._file = file
        self.position = position
        self.end = len(file) if end is None else min(end, len(file))

    def __bool__(self) -> bool:
        return self.position < self.end

    def take(self, size: int) -> bytes:
        start = self.skip(size)
        return self._file[start : self.position]

    def skip(self, size: int) -> int:
        """Goes on by `size`; returns where it was."""
        start = self.position
        if size > self.end - start:
            raise ContainerError("it is damaged: it ends too early")
        self.position += size
        return start

    def number(self, size: int, order: Literal["big", "little"] = "big") -> int:
        return int.from_bytes(self.take(size), order)

    def text(self) -> bytes:
        """Bytes up to a zero, which is skipped."""
        end = self._file.find(b"\0", self.position, self.end)
        if end < 0:
            raise ContainerError("it is damaged: a text in it has no end")
        data = self.take(end - self.position)
        self.skip(1)
        return data

    def within(self, size: int) -> _Reader:
        """A reader of the next `size` bytes, which are skipped here."""
        start = self.skip(size)
        return _Reader(self._file, start, start + size)


def _png(file: bytes) -> list[bytes]:
    """PNG (third edition), 5: chunks; 11.3.3.4: iTXt."""
    reader = _Reader(file, len(_PNG_SIGNATURE))
    while reader:
        size, kind = reader.number(4), reader.take(4)
        if kind != b"iTXt":
            reader.skip(size + 4)
            continue
        data = reader.take(size)
        if zlib.crc32(kind + data) != reader.number(4):
            raise ContainerError("it is damaged: the checksum of a text in it is wrong")
        chunk = _Reader(data)
        if chunk.text() != b"XML:com.adobe.xmp":
            continue
        compressed = chunk.number(2)
        chunk.text()
        chunk.text()
        packet = chunk.take(chunk.end - chunk.position)
        return [_inflated(packet) if compressed else packet]
    return []


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_XMP_BYTES)
    except zlib.error as error:
        raise ContainerError(f"it is damaged: {error}") from None


def _jpeg(file: bytes) -> list[bytes]:
    """JPEG (ITU T.81), B.1.1: segments up to the first scan. XMP specification part 3, 1.1.3: XMP in them."""
    reader = _Reader(file, 2)
    packet, portions = b"", dict[bytes, dict[int, bytes]]()
    while True:
        marker = reader.number(2)
        if marker >> 8 != 0xFF:
            raise ContainerError("it is damaged: a segment does not start where the one before it ends")
        if marker in (0xFFDA, 0xFFD9):
            break
        if marker == 0xFFFF:
            # A fill byte: the marker starts one byte later.
            reader.position -= 1
            continue
        if marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD7:
            continue
        data = reader.take(max(0, reader.number(2) - 2))
        if marker != 0xFFE1:
            continue
        if data.startswith(_JPEG_XMP):
            packet = packet or data[len(_JPEG_XMP) :]
        elif data.startswith(_JPEG_EXTENSION):
            segment = _Reader(data, len(_JPEG_EXTENSION))
            digest, _, offset = segment.take(32), segment.number(4), segment.number(4)
            portions.setdefault(digest, {})[offset] = data[segment.position :]
    if not packet:
        return []
    named = re.search(rb"HasExtendedXMP\s*(?:=\s*[\"']|>)\s*([0-9A-F]{32})", packet)
    if named is None:
        return [packet]
    # Importing it costs as much as all of the rest here, and hardly a file needs it.
    import hashlib

    found = portions.get(named[1], {})
    extension = b"".join(found[offset] for offset in sorted(found))
    if hashlib.md5(extension, usedforsecurity=False).hexdigest().upper().encode() != named[1]:
        raise ContainerError("it is damaged: a part of its metadata is missing")
    return [packet, extension]


def _webp(file: bytes) -> list[bytes]:
    """WebP container (RFC 9649), 2.3: chunks."""
    reader = _Reader(file, 12)
    while reader:
        kind, size = reader.take(4), reader.number(4, "little")
        data = reader.within(size)
        if kind == b"XMP ":
            return [data.take(size)]
        if size % 2 and reader:
            reader.skip(1)
    return []


def _avif(file: bytes) -> list[bytes]:
    """ISO base media file format (ISO/IEC 14496-12), 8.11: items; the XMP is one of type `mime`."""
    meta = _box(_Reader(file), b"meta")
    if meta is None:
        return []
    meta.skip(4)
    start = meta.position

    def child(kind: bytes) -> _Reader | None:
        return _box(_Reader(file, start, meta.end), kind)

    infos, locations, data = child(b"iinf"), child(b"iloc"), child(b"idat")
    item = None if infos is None else _xmp_item(infos)
    if item is None or locations is None:
        return []
    return [_item_data(file, locations, item, data)]


def _box(reader: _Reader, wanted: bytes) -> _Reader | None:
    """The content of the first box of a type."""
    while reader:
        start = reader.position
        size, kind = reader.number(4), reader.take(4)
        if size == 0:
            # It is the last one.
            size = reader.end - start
        elif size == 1:
            size = reader.number(8)
        content = reader.within(max(0, size - (reader.position - start)))
        if kind == wanted:
            return content
    return None


def _xmp_item(infos: _Reader) -> int | None:
    """The id of the item that is XMP, from the content of `iinf`."""
    version = infos.number(4) >> 24
    infos.skip(2 if version == 0 else 4)
    while (info := _box(infos, b"infe")) is not None:
        version = info.number(4) >> 24
        if version < 2:
            continue
        item = info.number(2 if version == 2 else 4)
        info.skip(2)
        if info.take(4) != b"mime":
            continue
        info.text()
        if info.text() == b"application/rdf+xml":
            return item
    return None


def _item_data(file: bytes, locations: _Reader, wanted: int, data: _Reader | None) -> bytes:
    """The bytes of an item, from the content of `iloc` and, for what lies there, of `idat`."""
    version = locations.number(4) >> 24
    sizes = locations.number(2)
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version in (1, 2) else 0
    item_size = 2 if version < 2 else 4
    for _ in range(locations.number(item_size)):
        item = locations.number(item_size)
        in_data = version in (1, 2) and locations.number(2) & 15 == 1
        locations.skip(2)
        base, extents = locations.number(base_size), locations.number(2)
        if item != wanted:
            locations.skip(extents * (index_size + offset_size + length_size))
            continue
        if in_data and data is None:
            break
        parts, total = [], 0
        for _ in range(extents):
            locations.skip(index_size)
            start, size = base + locations.number(offset_size), locations.number(length_size)
            total += size
            if total > MAX_XMP_BYTES:
                raise ContainerError("its XMP is too long")
            source = _Reader(file, data.position + start, data.end) if in_data and data else _Reader(file, start)
            parts.append(source.take(size))
        return b"".join(parts)
    raise ContainerError("it is damaged: its XMP lies nowhere")
