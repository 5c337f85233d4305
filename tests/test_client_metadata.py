"""Reading how an image was made: from what other programs make of our files, and from files not to be trusted."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from sdclient import Image as ClientImage
from sdclient import Metadata, MetadataError, Output, Prompt, read_metadata

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = (
    '{"engine": "tiny", "prompts": [{"text": "a lake", "weight": 1.0}], "seed": "7", "steps": 4, '
    '"output": {"quality": 9}}'
)
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/avif")

every_media_type = pytest.mark.parametrize("media_type", MEDIA_TYPES)


def xmp(request: str = REQUEST, engine: str = "<s:Engine>tiny</s:Engine>", before: str = "") -> bytes:
    escaped = request.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:s="urn:sdapi:v1#" s:EngineDigest="sha256:1">{engine}'
        f"<s:ServerVersion>0.1</s:ServerVersion><s:Request>{escaped}</s:Request></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def file_with(packet: bytes, media_type: str = "image/png") -> bytes:
    options: dict[str, Any] = {"xmp": packet}
    if media_type == "image/png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("Comment", "another text")
        chunks.add_itxt("XML:com.adobe.xmp", packet.decode("utf-8", "surrogateescape"))
        options = {"pnginfo": chunks}
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, media_type.removeprefix("image/"), **options)
    return file.getvalue()


FILES = {media_type: file_with(xmp(), media_type) for media_type in MEDIA_TYPES}


@every_media_type
def test_properties_are_read_as_elements_and_as_attributes(media_type: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[media_type])
    said = read_metadata(path)
    assert said == read_metadata(FILES[media_type]) == read_metadata(str(path))
    assert (said.engine, said.engine_digest, said.server_version) == ("tiny", "sha256:1", "0.1")
    assert said.prompts == (Prompt("a lake", 1.0),)
    assert said.options == {"engine": "tiny", "seed": 7, "steps": 4, "output": Output(quality=9)}


def test_an_image_has_its_metadata() -> None:
    image = ClientImage(data=FILES["image/png"], media_type="image/png", width=8, height=8, index=0, seed=7)
    assert image.metadata == read_metadata(image.data)


def test_compressed_xmp_of_a_png_is_read() -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", xmp().decode(), zip=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    assert read_metadata(file.getvalue()) == read_metadata(FILES["image/png"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "it is no PNG, JPEG, WebP or AVIF file"),
        (b"GIF89a", "it is no PNG, JPEG, WebP or AVIF file"),
        (file_with(b"<a/>"), "it carries no metadata of sdserver"),
        (file_with(b"<a>"), "its XMP is damaged"),
        (file_with(xmp(before="<!DOCTYPE x [<!ENTITY a 'b'>]>")), "its XMP declares entities"),
        (file_with(xmp(engine="")), "it carries no metadata of sdserver"),
        (file_with(xmp("{")), "its request is not one that this sdclient knows"),
        (file_with(xmp("[" * 100_000)), "its request is not one that this sdclient knows"),
        (file_with(xmp('{"dreams": 3}')), "install a newer one"),
        (file_with(xmp('{"sampler": "SAMPLER_NEWER"}')), "install a newer one"),
        (FILES["image/png"].replace(b"a lake", b"a loke"), "the checksum of a text in it is wrong"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_says_why(file: bytes, message: str) -> None:
    with pytest.raises(MetadataError, match="cannot read how the image was made") as caught:
        read_metadata(file)
    assert message in str(caught.value)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lake.png"
    path.write_bytes(b"")
    with pytest.raises(MetadataError, match=r"lake\.png"):
        read_metadata(path)
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "sea.png")


def test_an_extension_with_a_missing_part_is_an_error_and_another_ones_is_none() -> None:
    main = xmp().replace(
        b'xmlns:s="urn:sdapi:v1#"',
        b'xmlns:s="urn:sdapi:v1#" xmlns:n="http://ns.adobe.com/xmp/note/" n:HasExtendedXMP="' + b"A" * 32 + b'"',
    )
    with pytest.raises(MetadataError, match="a part of its metadata is missing"):
        read_metadata(file_with(main, "image/jpeg"))
    stray = b"http://ns.adobe.com/xmp/extension/\0" + b"B" * 32 + struct.pack(">II", 3, 0) + b"abc"
    file = FILES["image/jpeg"]
    assert read_metadata(file[:2] + b"\xff\xe1" + struct.pack(">H", len(stray) + 2) + stray + file[2:])


# Nothing of this may crash or hang, whatever it makes of the file.


def read_anything(file: bytes) -> None:
    with suppress(MetadataError):
        assert isinstance(read_metadata(file), Metadata)


@every_media_type
def test_every_beginning_of_a_file_is_read_or_refused(media_type: str) -> None:
    file = FILES[media_type]
    for size in range(len(file)):
        read_anything(file[:size])


@every_media_type
@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(media_type: str, data: st.DataObject) -> None:
    file = bytearray(FILES[media_type])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(file) - 1))
        file[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    read_anything(bytes(file))


@settings(max_examples=300)
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x10ftypavif\0\0\0\0"]),
    rest=st.binary(max_size=200),
)
def test_bytes_behind_a_signature_are_read_or_refused(start: bytes, rest: bytes) -> None:
    read_anything(start + rest)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["NaN", "1e99", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "prompts",
    "seed",
    "seeds",
    "steps",
    "sampler",
    "output",
    "initImage",
    "guidanceScale",
    "guidanceInterval",
    "tileX",
]


@settings(max_examples=300)
@given(request=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_a_request_of_any_json_is_read_or_refused(request: dict[str, Any]) -> None:
    read_anything(file_with(xmp(json.dumps(request))))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("extents", [0, 1, 65_535])
def test_items_that_lie_everywhere_do_not_make_it_hang(extents: int) -> None:
    """60,000 items of 65,535 empty extents each, and one that holds the file 65,535 times."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content) + 8) + kind + content

    info = box(b"infe", b"\2\0\0\0" + struct.pack(">HH", 1, 0) + b"mime\0application/rdf+xml\0")
    empty = struct.pack(">HHH", 9, 0, 65_535) * 60_000
    for sizes, many in ((0, empty), (0x4400, b"")):
        pieces = struct.pack(">II", 0, 2**31 if sizes and extents == 1 else 50_000) * extents if sizes else b""
        item = struct.pack(">HHH", 1, 0, extents) + pieces
        count = 1 + len(many) // 6
        iloc = box(b"iloc", b"\0\0\0\0" + struct.pack(">HH", sizes, count) + many + item)
        meta = box(b"meta", b"\0\0\0\0" + box(b"iinf", b"\0\0\0\0\0\1" + info) + iloc)
        read_anything(box(b"ftyp", b"avif") + meta + bytes(60_000))


def test_a_compressed_text_that_would_fill_the_memory_is_refused() -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    data = b"iTXtXML:com.adobe.xmp\0\1\0\0\0" + bomb
    file = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    with pytest.raises(MetadataError):
        read_metadata(file)
