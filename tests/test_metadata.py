"""What the server writes into its files, read back by the SDK and by other programs' rules."""

from __future__ import annotations

import io
import itertools
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import calls
import numpy as np
import pytest
from calls import events_of, images_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sdapi.v1 import generation_pb2
from sdclient import MetadataError, read_metadata
from sdclient._wire import to_event, to_request
from sdserver import wire
from sdserver.engines import load_catalog
from sdserver.image_writer import ImageWriter
from sdserver.images import MEDIA_TYPES, encode, missing_codecs
from sdserver.metadata import VERSION, metadata
from sdserver.settings import ServeSettings

if TYPE_CHECKING:
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdclient import Metadata
    from sdserver.engines import Catalog
    from sdserver.request import GenerationRequest

CATALOG = load_catalog(ServeSettings().model_repository)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
HOSTILE = "a <lake> & \"sea\" ]]> 'x'\r\n\t\x00\x01\x7f\x85\u2028\ufffe\uffff é 水 🏔️ \\(:1) <?xpacket end?>"

every_media_type = pytest.mark.parametrize("media_type", MEDIA_TYPES)


def a_request(**fields: Any) -> generation_pb2.GenerateRequest:
    return calls.a_request(**{"output": generation_pb2.Output(), **fields})


def resolved(**fields: Any) -> GenerationRequest:
    return wire.to_request(a_request(**fields), "r", CATALOG)


def prompts(*texts: str) -> list[generation_pb2.Prompt]:
    return [generation_pb2.Prompt(text=text) for text in texts]


def file_of(request: GenerationRequest, media_type: str) -> bytes:
    quality = 95 if MEDIA_TYPES[media_type][1] else None
    request = replace(request, output=replace(request.output, media_type=media_type, quality=quality))
    return encode(PIXELS, request.output, metadata(request, wire.to_json(request)))


def parameters_of(file: bytes) -> str:
    """A1111's text, found as A1111 finds it: the chunk `parameters`, or the EXIF comment."""
    image = Image.open(io.BytesIO(file))
    if image.format == "PNG":
        image.load()
        return str(image.info["parameters"])
    comment: bytes = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


def segments(jpeg: bytes) -> list[bytes]:
    found, position = [], 2
    while jpeg[position : position + 2] != b"\xff\xda":
        [size] = struct.unpack(">H", jpeg[position + 2 : position + 4])
        found.append(jpeg[position + 4 : position + 2 + size])
        position += 2 + size
    return found


# The request


@every_media_type
async def test_a_file_says_its_request_its_engine_and_its_server(
    stub: GenerationServiceAsyncStub, catalog: Catalog, media_type: str
) -> None:
    output = generation_pb2.Output(media_type=media_type)
    events = await events_of(stub, a_request(seed=7, output=output, sampler="SAMPLER_EULER", churn=0.1))
    accepted: Any = to_event(events[0])
    [image] = images_of(events)
    assert image.media_type == media_type
    said = read_metadata(image.data)
    assert (said.engine, said.engine_digest) == (catalog.default.id, catalog.default.digest)
    assert said.server_version == VERSION
    assert said.prompts == accepted.prompts
    assert said.options == accepted.options
    assert said.options["seed"] == 7
    assert said.options["churn"] == 0.1


async def test_an_image_of_a_batch_says_what_makes_it_alone_and_that_gives_the_same_bytes(
    stub: GenerationServiceAsyncStub,
) -> None:
    images = images_of(await events_of(stub, a_request(seeds=[9, 2**63 - 1, 0])))
    for image in images:
        said = read_metadata(image.data)
        assert (said.options["seed"], said.options["image_count"]) == (image.seed, 1)
        again = to_request(said.prompts, said.options)
        assert images_of(await events_of(stub, again))[0].data == image.data


async def test_who_asked_and_what_was_previewed_is_not_in_the_file(stub: GenerationServiceAsyncStub) -> None:
    preview = generation_pb2.PreviewOptions(every_steps=2)
    one, other = [
        images_of(await events_of(stub, a_request(seed=1, **fields)))[0].data
        for fields in ({"request_id": "me", "preview": preview}, {"request_id": "you"})
    ]
    assert one == other


@every_media_type
async def test_metadata_can_be_left_out_and_does_not_touch_the_pixels(
    stub: GenerationServiceAsyncStub, media_type: str
) -> None:
    plain, full = [
        images_of(await events_of(stub, a_request(seed=1, output=output)))[0].data
        for output in (
            generation_pb2.Output(media_type=media_type, metadata=False),
            generation_pb2.Output(media_type=media_type),
        )
    ]
    with pytest.raises(MetadataError, match="carries no metadata"):
        read_metadata(plain)
    assert read_metadata(full).options["seed"] == 1
    for mark in (b"sdapi", b"parameters", b"UNICODE", b"xpacket"):
        assert mark not in plain
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(plain))), np.asarray(Image.open(io.BytesIO(full))))


def text_of(said: Metadata) -> list[str]:
    return [prompt.text for prompt in said.prompts]


@every_media_type
@settings(max_examples=30)
@given(text=st.text(min_size=1, max_size=40).filter(str.strip))
@example(text=HOSTILE)
def test_every_prompt_is_read_back_as_it_was(media_type: str, text: str) -> None:
    file = file_of(resolved(prompts=prompts(text)), media_type)
    assert text_of(read_metadata(file)) == [text]
    parameters = parameters_of(file)
    assert parameters.splitlines()[-1].startswith("Steps: 4, ")
    assert len(parameters.splitlines()) == 2
    assert all(character.isprintable() or ord(character) > 0x9F for character in parameters.replace("\n", ""))


@every_media_type
def test_the_longest_request_is_in_the_file_whole(media_type: str) -> None:
    texts = ["水🏔é" * 3332 + f"{number:04}" for number in range(64)]
    file = file_of(resolved(prompts=prompts(*texts)), media_type)
    assert text_of(read_metadata(file)) == texts
    assert np.asarray(Image.open(io.BytesIO(file))).shape == PIXELS.shape
    assert ("[shortened; this file's XMP has all of it]" in parameters_of(file)) == (media_type == "image/jpeg")
    assert parameters_of(file).splitlines()[-1].startswith("Steps: 4, ")


@pytest.mark.parametrize("characters", [100, 9_000, 9_900, 10_000])
@pytest.mark.parametrize("count", [1, 3, 6, 7, 8, 64])
def test_a_jpeg_has_one_segment_of_xmp_or_extended_xmp(characters: int, count: int) -> None:
    texts = ["x" * characters] * count
    file = file_of(resolved(prompts=prompts(*texts)), "image/jpeg")
    standard = [part for part in segments(file) if part.startswith(b"http://ns.adobe.com/xap/1.0/\0")]
    extended = [part for part in segments(file) if part.startswith(b"http://ns.adobe.com/xmp/extension/\0")]
    assert len(standard) == 1
    assert (b"HasExtendedXMP" in standard[0]) == bool(extended)
    assert text_of(read_metadata(file)) == texts


@every_media_type
def test_other_programs_find_what_the_iptc_asks_for(media_type: str) -> None:
    image = Image.open(io.BytesIO(file_of(resolved(), media_type)))
    image.load()
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    properties = {element.tag: element.text for element in ElementTree.fromstring(image.info["xmp"]).iter()}
    assert properties[f"{iptc}DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert properties[f"{iptc}AISystemUsed"] == CATALOG.default.name
    assert properties[f"{iptc}AISystemVersionUsed"] == CATALOG.default.digest
    assert properties[f"{iptc}AIPromptInformation"] == "1: a lake at dusk"
    assert properties["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == f"sd-service {VERSION}"


# A1111's text


def text_for(**fields: Any) -> list[str]:
    return parameters_of(file_of(resolved(**fields), "image/png")).splitlines()


def test_the_text_has_a1111s_names() -> None:
    negative = generation_pb2.Prompt(text="trees", weight=-1)
    lines = text_for(
        prompts=[*prompts("a lake, dusk"), negative],
        seed=5,
        steps=20,
        sampler="SAMPLER_DPMPP_2M_SDE",
        schedule="SCHEDULE_KARRAS",
        guidance_scale=7.5,
        width=96,
        eta=0.5,
    )
    assert lines == [
        "a lake, dusk",
        "Negative prompt: trees",
        "Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7.5, Seed: 5, Size: 96x64, "
        f"Model: {CATALOG.default.id}, Eta: 0.5, Version: sd-service {VERSION}",
    ]


def test_every_sampler_and_schedule_has_a_name_in_the_text() -> None:
    names = {
        text_for(sampler=sampler, schedule=schedule)[-1].split(", CFG")[0]
        for sampler, schedule in itertools.product(wire_labels("Sampler"), wire_labels("Schedule"))
    }
    assert len(names) == len(wire_labels("Sampler")) * len(wire_labels("Schedule"))


def wire_labels(enum: str) -> list[str]:
    values = generation_pb2.DESCRIPTOR.dependencies[-1].enum_types_by_name[enum].values[1:]
    return [value.name for value in values]


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        (generation_pb2.Prompt(text=r"a (big) [red] C:\art"), r"a \(big\) \[red\] C:\\art"),
        (generation_pb2.Prompt(text="two\nlines"), "two lines"),
        (
            generation_pb2.Prompt(
                text="a lake, (trees)", emphasis=[generation_pb2.Emphasis(start=8, end=15, factor=1.3)]
            ),
            r"a lake, (\(trees\):1.3)",
        ),
        # A1111 would take the 9 for a weight.
        (generation_pb2.Prompt(text="a screen of 16:9"), "a screen of 16:9 :1"),
    ],
)
def test_signs_of_a1111_are_escaped_and_emphasis_is_written_with_them(
    prompt: generation_pb2.Prompt, written: str
) -> None:
    assert text_for(prompts=[prompt])[0] == written


def weighted(*weights: float) -> list[generation_pb2.Prompt]:
    return [generation_pb2.Prompt(text=f"p{number}", weight=weight) for number, weight in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "blending", "lines"),
    [
        ((2, 1, -1, 0), "BLENDING_TEXT_ENCODER", ["p0 :0.667 AND p1 :0.333", "Negative prompt: (p2:0.333)"]),
        ((1, -2, -1), "BLENDING_TEXT_ENCODER", ["p0", "Negative prompt: p1, p2"]),
        ((-0.5,), "BLENDING_TEXT_ENCODER", ["", "Negative prompt: (p0:0.5)"]),
        ((2, -1), "BLENDING_COMPOSABLE", ["p0 :2 AND p1 :-1"]),
        ((1,), "BLENDING_COMPOSABLE", ["p0"]),
    ],
)
def test_several_prompts_are_written_with_and(weights: tuple[float, ...], blending: str, lines: list[str]) -> None:
    assert text_for(prompts=weighted(*weights), blending=blending)[:-1] == lines


# Files


def test_a_pillow_without_a_codec_is_named() -> None:
    assert missing_codecs() == []
    assert missing_codecs(lambda codec: codec != "avif") == ["avif"]


@pytest.mark.parametrize("media_type", [media_type for media_type, (_, lossy) in MEDIA_TYPES.items() if lossy])
def test_a_greater_quality_is_a_greater_file_and_a_smaller_error(media_type: str) -> None:
    request = resolved()
    sizes, errors = [], []
    smooth = np.asarray(Image.fromarray(PIXELS).resize((160, 96), Image.Resampling.BICUBIC))
    for quality in (1, 50, 100):
        file = encode(smooth, replace(request.output, media_type=media_type, quality=quality))
        sizes.append(len(file))
        decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float64)
        errors.append(float(np.abs(decoded - smooth).mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


@every_media_type
async def test_equal_requests_are_equal_files(media_type: str) -> None:
    request = resolved(seed=1, output=generation_pb2.Output(media_type=media_type))
    writer = ImageWriter(wire.to_json)
    assert await writer.write(PIXELS, request, 0) == await writer.write(PIXELS, replace(request, request_id="s"), 0)
