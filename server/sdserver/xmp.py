"""XMP (ISO 16684-1): properties of an image -> the packet that its file carries, and its JPEG segments."""

from __future__ import annotations

import hashlib
import re
import struct
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMESPACES = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "sdapi": "urn:sdapi:v1#",
}

# A JPEG segment holds 65,533 bytes behind its length.
MAX_SEGMENT = 65_533
_STANDARD = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
# XMP specification part 3, 1.1.3.1: what of an extended packet goes into one segment.
_PORTION = 65_400
# Longer values move to the extended packet where one segment cannot hold all.
_SHORT = 1_000
# Everything that XML 1.0 has no way to write (2.2, Char).
_NO_CHARACTER = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def packet(properties: Mapping[str, str]) -> bytes:
    """The packet with these properties, by names such as `xmp:CreatorTool`; prefixes are those of NAMESPACES.

    Characters that XML does not have are written as U+FFFD.
    """
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{begin}\n{_document(properties)}\n<?xpacket end="r"?>'.encode()


def jpeg_segments(properties: Mapping[str, str]) -> bytes:
    """The same as APP1 segments: one, or, where that is too small, with long values as ExtendedXMP."""
    whole = packet(properties)
    if len(_STANDARD) + len(whole) <= MAX_SEGMENT:
        return segment(_STANDARD + whole)
    long = {name: value for name, value in properties.items() if len(value) > _SHORT}
    extended = _document(long).encode()
    digest = hashlib.md5(extended, usedforsecurity=False).hexdigest().upper()
    short = {name: value for name, value in properties.items() if name not in long}
    segments = [segment(_STANDARD + packet({**short, "xmpNote:HasExtendedXMP": digest}))]
    for offset in range(0, len(extended), _PORTION):
        header = _EXTENSION + digest.encode() + struct.pack(">II", len(extended), offset)
        segments.append(segment(header + extended[offset : offset + _PORTION]))
    return b"".join(segments)


def segment(data: bytes) -> bytes:
    """An APP1 segment of a JPEG file, of at most MAX_SEGMENT bytes of data."""
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


def _document(properties: Mapping[str, str]) -> str:
    used = sorted({name.partition(":")[0] for name in properties})
    namespaces = "".join(f' xmlns:{prefix}="{NAMESPACES[prefix]}"' for prefix in used)
    elements = "\n".join(f"   <{name}>{_text(value)}</{name}>" for name, value in properties.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        f'  <rdf:Description rdf:about=""{namespaces}>\n{elements}\n  </rdf:Description>\n'
        " </rdf:RDF>\n"
        "</x:xmpmeta>"
    )


def _text(value: str) -> str:
    # A bare carriage return would be read back as a line feed (XML 1.0, 2.11).
    return escape(_NO_CHARACTER.sub("\ufffd", value), {"\r": "&#13;"})
