"""Content Credentials: signed last, read by the reference library, broken by any change; wrong keys stop the start."""

from __future__ import annotations

import datetime
import io
import sys
from typing import TYPE_CHECKING, Any

import c2pa
import grpc
import numpy as np
import pytest
from c2pa_chain import NOW, write_chain
from calls import a_request, events_of, images_of
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes import FakeBackend
from sdapi.v1 import generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdclient import read_metadata
from sdclient._wire import to_event
from sdserver import wire
from sdserver.engines import load_catalog
from sdserver.errors import GenerationFailed
from sdserver.image_writer import ImageWriter
from sdserver.images import MEDIA_TYPES
from sdserver.server import Server, ServerError
from sdserver.settings import ServeSettings
from sdserver.signing import Signer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub


@pytest.fixture
def signing(settings: ServeSettings, tmp_path: Path) -> ServeSettings:
    """A server that signs with a chain that was made for this test."""
    certificates, private_key = write_chain(tmp_path)
    return settings.model_copy(update={"c2pa_certificates": certificates, "c2pa_private_key": private_key})


@pytest.fixture
async def signing_stub(signing: ServeSettings) -> AsyncIterator[GenerationServiceAsyncStub]:
    async with (
        Server(signing, FakeBackend()) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


async def image_as(stub: GenerationServiceAsyncStub, media_type: str, **output: Any) -> generation_pb2.Image:
    request = a_request(seed=3, output=generation_pb2.Output(media_type=media_type, **output))
    [image] = images_of(await events_of(stub, request))
    return image


def read(image: generation_pb2.Image, data: bytes | None = None) -> c2pa.Reader:
    settings = c2pa.Settings.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
    file = io.BytesIO(image.data if data is None else data)
    return c2pa.Reader(image.media_type, file, context=c2pa.Context(settings))


def failures(reader: c2pa.Reader) -> set[str]:
    # The chain is the test's own, which nobody trusts.
    found = reader.get_validation_results()["activeManifest"]["failure"]
    return {failure["code"] for failure in found} - {"signingCredential.untrusted"}


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
async def test_a_signed_image_says_that_a_model_made_it_and_is_valid(
    signing_stub: GenerationServiceAsyncStub, media_type: str
) -> None:
    image = await image_as(signing_stub, media_type)
    assert image.signed
    with read(image) as reader:
        assert reader.get_validation_state() == "Valid"
        assert failures(reader) == set()
        manifest = reader.get_active_manifest()
    assert manifest["claim_generator_info"][0]["name"] == "sd-service"
    assert manifest["signature_info"]["common_name"] == "Test signer"
    [assertion] = [part for part in manifest["assertions"] if part["label"].startswith("c2pa.actions")]
    [action] = assertion["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert action["softwareAgent"]["name"] == "tiny-landscape"


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
async def test_one_changed_byte_breaks_the_signature(signing_stub: GenerationServiceAsyncStub, media_type: str) -> None:
    image = await image_as(signing_stub, media_type)
    # In the prompt: metadata is signed, too.
    data = bytearray(image.data)
    data[data.index(b"a lake at dusk")] ^= 1
    with read(image, bytes(data)) as reader:
        assert reader.get_validation_state() == "Invalid"
        assert failures(reader) & {"assertion.dataHash.mismatch", "assertion.bmffHash.mismatch"}


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
async def test_a_signed_file_still_says_how_it_was_made(
    signing_stub: GenerationServiceAsyncStub, media_type: str
) -> None:
    image = await image_as(signing_stub, media_type)
    assert read_metadata(image.data).options["seed"] == 3
    event: Any = to_event(generation_pb2.GenerateResponse(image=image))
    assert event.signed
    assert event.metadata == read_metadata(image.data)


async def test_an_image_without_metadata_is_signed_all_the_same(signing_stub: GenerationServiceAsyncStub) -> None:
    image = await image_as(signing_stub, "image/png", metadata=False)
    assert image.signed
    with read(image) as reader:
        assert reader.get_validation_state() == "Valid"


async def test_images_of_one_request_are_signed_at_once(signing_stub: GenerationServiceAsyncStub) -> None:
    images = images_of(await events_of(signing_stub, a_request(image_count=4)))
    for image in images:
        with read(image) as reader:
            assert reader.get_validation_state() == "Valid"


async def test_without_a_key_nothing_is_signed(stub: GenerationServiceAsyncStub) -> None:
    image = await image_as(stub, "image/png")
    assert not image.signed
    with pytest.raises(c2pa.C2paError):
        read(image)


class BrokenSigner(Signer):
    """Its authority has gone away."""

    def __init__(self) -> None:
        pass

    def sign(self, *arguments: object) -> bytes:
        raise OSError("nobody answers")


async def test_an_image_that_cannot_be_signed_is_an_error() -> None:
    request = wire.to_request(a_request(), "r", load_catalog(ServeSettings().model_repository))
    with pytest.raises(GenerationFailed) as caught:
        await ImageWriter(wire.to_json, BrokenSigner()).write(np.zeros((8, 8, 3), np.uint8), request, 0)
    assert caught.value.reason == "NOT_SIGNED"
    assert "nobody answers" not in caught.value.message


# The start


async def refusal(settings: ServeSettings) -> str:
    with pytest.raises(ServerError) as caught:
        await Server(settings, FakeBackend()).__aenter__()
    return str(caught.value)


async def test_half_of_the_settings_stops_the_start(signing: ServeSettings) -> None:
    for name in ("c2pa_certificates", "c2pa_private_key"):
        assert "set the other one" in await refusal(signing.model_copy(update={name: None}))


async def test_a_key_that_does_not_work_stops_the_start_and_is_not_shown(
    signing: ServeSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert signing.c2pa_private_key is not None
    (tmp_path / "other").mkdir()
    other_chain, other_key = write_chain(tmp_path / "other")
    broken = tmp_path / "broken.pem"
    broken.write_text(signing.c2pa_private_key.read_text().replace("\nM", "\nN"))
    cases: list[dict[str, object]] = [
        {"c2pa_private_key": broken},
        {"c2pa_private_key": other_key},
        {"c2pa_certificates": other_chain},
        {"c2pa_certificates": signing.c2pa_private_key},
        {"c2pa_algorithm": "ps256"},
    ]
    for case in cases:
        message = await refusal(signing.model_copy(update=case))
        assert "cannot sign with" in message
        shown = message + "".join(capsys.readouterr())
        for path in (signing.c2pa_private_key, other_key, broken):
            assert not any(line in shown for line in path.read_text().splitlines()[1:-1])
    assert "cannot read" in await refusal(signing.model_copy(update={"c2pa_private_key": tmp_path / "none.pem"}))


@pytest.mark.parametrize(
    "chain",
    [{"purpose": ExtendedKeyUsageOID.SERVER_AUTH}, {"end": NOW - datetime.timedelta(days=1)}],
    ids=["another purpose", "expired"],
)
async def test_a_certificate_that_c2pa_does_not_allow_stops_the_start(
    signing: ServeSettings, tmp_path: Path, chain: dict[str, Any]
) -> None:
    certificates, private_key = write_chain(tmp_path, **chain)
    settings = signing.model_copy(update={"c2pa_certificates": certificates, "c2pa_private_key": private_key})
    assert "cannot sign with" in await refusal(settings)


async def test_signing_without_the_library_says_what_to_install(
    signing: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert "pip install 'sd-service[server,c2pa]'" in await refusal(signing)
