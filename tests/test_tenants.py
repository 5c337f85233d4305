"""Who may call, and over what: API keys, TLS, connections that grow old."""

from __future__ import annotations

import asyncio
import os
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import sdserver.logs
import structlog
import trustme
from calls import a_request, details_of, events_of, failure_of
from cryptography.hazmat.primitives import serialization
from fakes import FakeBackend
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sdapi.v1 import generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdclient import AsyncClient, AuthenticationError, Tls, UnavailableError
from sdclient.__main__ import main as sdclient_main
from sdserver.errors import Unauthenticated
from sdserver.observation import ANONYMOUS, Observer
from sdserver.server import Server, ServerError
from sdserver.tenants import Tenants, read_api_keys
from sdserver.watched_files import FileError, WatchedFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789abc"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\nalice {ALICE}\nbob\t{BOB}\n")
    return path


def bearer(key: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {key}")]


# The file


def test_each_key_has_the_name_of_its_line_and_a_name_may_have_several(keys: Path) -> None:
    with keys.open("a") as file:
        file.write(f"alice {ALICE}-new\n")
    tenants = Tenants(keys)
    assert [tenants.of(bearer(key)) for key in (ALICE, BOB, f"{ALICE}-new")] == ["alice", "bob", "alice"]


def test_without_a_file_everybody_is_anonymous() -> None:
    assert Tenants(None).of([]) == Tenants(None).of(bearer(ALICE)) == ANONYMOUS


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "API_KEY_MISSING"),
        ([("authorization", ALICE)], "API_KEY_MALFORMED"),
        ([("authorization", f"Basic {ALICE}")], "API_KEY_MALFORMED"),
        ([("authorization", "Bearer")], "API_KEY_MALFORMED"),
        ([("authorization", "Bearer ")], "API_KEY_MALFORMED"),
        (bearer(ALICE) + bearer(BOB), "API_KEY_MALFORMED"),
        (bearer(ALICE) + bearer(ALICE), "API_KEY_MALFORMED"),
        (bearer(ALICE[:-1]), "API_KEY_INVALID"),
        (bearer(ALICE + " "), "API_KEY_INVALID"),
        (bearer(ALICE.upper()), "API_KEY_INVALID"),
        (bearer("alice"), "API_KEY_INVALID"),
        (bearer("ключ" * 4), "API_KEY_INVALID"),
    ],
)
def test_what_is_not_exactly_one_known_key_is_refused(
    keys: Path, headers: list[tuple[str, str | bytes]], reason: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tenants(keys).of(headers)
    assert caught.value.reason == reason
    assert ALICE not in caught.value.message


def test_the_word_bearer_is_known_in_any_case(keys: Path) -> None:
    assert Tenants(keys).of([("authorization", f"bearer {ALICE}")]) == "alice"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alice\n", "line 1"),
        (f"alice {ALICE} more\n", "line 1"),
        (f"# fine\nal/ice {ALICE}\n", "line 2"),
        ("alice short\n", "16 to 256"),
        (f"alice {ALICE}\nbob {ALICE}\n", "line 2: the key of alice once more"),
        (f"other {ALICE}\n", "choose another name"),
        (f"anonymous {ALICE}\n", "choose another name"),
        ("# nobody\n", "nobody could call"),
        ("", "nobody could call"),
    ],
)
def test_a_file_that_is_wrong_names_the_line_and_shows_no_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_api_keys(path)
    assert problem in str(caught.value)
    assert ALICE not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*nowhere"):
        read_api_keys(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"alice \xff\xff")
    with pytest.raises(FileError, match="not text"):
        read_api_keys(tmp_path / "bytes")


def test_the_keys_are_those_of_the_file_as_it_is_now(keys: Path) -> None:
    tenants = Tenants(keys)
    keys.write_text(f"bob {BOB}\n")
    with pytest.raises(Unauthenticated):
        tenants.of(bearer(ALICE))
    assert tenants.of(bearer(BOB)) == "bob"


def test_a_file_exchanged_as_kubernetes_does_it_is_read_again(keys: Path, tmp_path: Path) -> None:
    for folder, key in (("first", ALICE), ("second", BOB)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys").write_text(f"alice {key}\n")
    link, data = tmp_path / "mounted", tmp_path / "..data"
    data.symlink_to("first")
    link.symlink_to("..data/keys")
    tenants = Tenants(link)
    assert tenants.of(bearer(ALICE)) == "alice"
    (tmp_path / "..new").symlink_to("second")
    (tmp_path / "..new").replace(data)
    assert tenants.of(bearer(BOB)) == "alice"
    with pytest.raises(Unauthenticated):
        tenants.of(bearer(ALICE))


def test_while_a_file_does_not_work_what_was_read_before_counts(keys: Path) -> None:
    tenants = Tenants(keys)
    keys.write_text("nonsense")
    assert tenants.of(bearer(ALICE)) == "alice"
    keys.unlink()
    assert tenants.of(bearer(ALICE)) == "alice"
    keys.write_text(f"carol {ALICE}\n")
    assert tenants.of(bearer(ALICE)) == "carol"


def test_files_that_stay_are_read_once(tmp_path: Path) -> None:
    path, reads = tmp_path / "file", list[int]()
    path.write_text("x")
    files = WatchedFiles([path], lambda: reads.append(1))
    for _ in range(3):
        files.current()
    assert len(reads) == 1
    os.utime(path, ns=(0, 0))
    files.current()
    assert len(reads) == 2


# The server


class Tenancy(Observer):
    """Remembers whose generations were."""

    def __init__(self) -> None:
        self.tenants: list[str] = []

    def spent(self, tenant: str, pixel_steps: int) -> None:
        self.tenants.append(tenant)


@pytest.fixture
async def keyed(settings: ServeSettings, backend: FakeBackend, keys: Path) -> AsyncIterator[Server]:
    async with Server(settings.model_copy(update={"api_keys": keys}), backend) as server:
        yield server


async def one_answer(channel: grpc.aio.Channel, path: str, streaming: bool, data: bytes) -> object:
    unary: Any = channel.unary_unary(path)
    stream: Any = channel.unary_stream(path)
    return [event async for event in stream(data)] if streaming else await unary(data)


async def test_every_method_of_the_service_wants_a_key(keyed: Server) -> None:
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{keyed.port}") as channel:
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            for data in (b"", b"\xff\xff\xff\xff"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await one_answer(channel, path, method.server_streaming, data)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                info = details_of(caught.value, error_details_pb2.ErrorInfo)
                assert info.reason == "API_KEY_MISSING"
                assert "SDCLIENT_API_KEY" in (caught.value.details() or "")


async def test_health_and_reflection_want_none(keyed: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{keyed.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub_class: Any = reflection_pb2_grpc.ServerReflectionStub
        call = stub_class(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert (await call.read()).list_services_response.service
        call.cancel()


async def test_the_key_of_a_call_says_whose_the_generation_is(
    settings: ServeSettings, backend: FakeBackend, keys: Path
) -> None:
    tenancy = Tenancy()
    async with Server(settings.model_copy(update={"api_keys": keys}), backend, [tenancy]) as server:
        for key in (ALICE, BOB):
            async with AsyncClient(f"127.0.0.1:{server.port}", api_key=key) as client:
                assert await client.generate("a lake", steps=2)
                assert await client.engines()
    assert tenancy.tenants == ["alice", "bob"]


async def test_an_unknown_key_is_an_error_that_says_what_to_do(keyed: Server) -> None:
    async with AsyncClient(f"127.0.0.1:{keyed.port}", api_key="not-a-key-of-anybody") as client:
        with pytest.raises(AuthenticationError, match="misspelt, or has been revoked") as caught:
            await client.generate("a lake")
    assert caught.value.reason == "API_KEY_INVALID"


async def test_a_revoked_key_ends_without_a_restart(keyed: Server, keys: Path) -> None:
    async with AsyncClient(f"127.0.0.1:{keyed.port}", api_key=ALICE) as client:
        assert await client.engines()
        keys.write_text(f"bob {BOB}\n")
        with pytest.raises(AuthenticationError):
            await client.engines()


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_no_key_and_no_prompt_of_a_failure_is_logged(
    keyed: Server, backend: FakeBackend, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    before = structlog.get_config()
    sdserver.logs.configure("debug", log_format)
    try:
        backend.error = ZeroDivisionError("on purpose")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{keyed.port}") as channel:
            call = GenerationServiceStub(channel).Generate(
                a_request(prompts=[{"text": "a secret garden"}]), metadata=[("authorization", f"Bearer {ALICE}")]
            )
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [event async for event in call]
    finally:
        structlog.configure(**before)
    text = capsys.readouterr().err
    assert "on purpose" in text
    assert "alice" in text, "the tenant is logged"
    assert ALICE not in text
    assert "secret garden" not in text


# TLS


class Authority:
    """Certificates of a test, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, host: str = "127.0.0.1") -> tuple[Path, Path]:
        """Writes a chain and its key, over those of the same name; returns their paths."""
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        leaf = self._ca.issue_cert(host)
        certificate.write_bytes(b"".join(part.bytes() for part in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return certificate, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    folder = tmp_path / "authority"
    folder.mkdir()
    return Authority(folder)


def with_tls(settings: ServeSettings, authority: Authority, **more: Any) -> ServeSettings:
    certificate, key = authority.issue("server")
    return settings.model_copy(update={"tls_certificate": certificate, "tls_private_key": key, **more})


async def test_both_clients_trust_the_authority_that_they_are_told(
    settings: ServeSettings, backend: FakeBackend, authority: Authority
) -> None:
    async with Server(with_tls(settings, authority), backend) as server:
        target = f"127.0.0.1:{server.port}"
        async with AsyncClient(target, tls=authority.ca) as client:
            assert await client.generate("a lake", steps=2)
        for tls in (True, False):
            async with AsyncClient(target, tls=tls) as client:
                with pytest.raises(UnavailableError, match="tls") as caught:
                    await client.engines(timeout=5)
                assert caught.value.code == "UNAVAILABLE"


async def test_the_command_line_shows_a_key_over_mutual_tls(
    settings: ServeSettings, backend: FakeBackend, authority: Authority, keys: Path, tmp_path: Path
) -> None:
    certificate, key = authority.issue("client")
    (tmp_path / "key").write_text(f"{ALICE}\n")
    strict = with_tls(settings, authority, tls_client_ca=authority.ca, api_keys=keys)
    async with Server(strict, backend) as server:
        flags = {
            "--server": f"127.0.0.1:{server.port}",
            "--api-key-file": tmp_path / "key",
            "--tls": authority.ca,
            "--tls-certificate": certificate,
            "--tls-private-key": key,
        }
        arguments = [str(part) for flag in flags.items() for part in flag]
        assert await asyncio.to_thread(sdclient_main, ["engines", "--json", *arguments]) == 0


async def test_mutual_tls_wants_a_certificate_of_its_authority(
    settings: ServeSettings, backend: FakeBackend, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "strangers").mkdir()
    strangers = Authority(tmp_path / "strangers")
    certificate, key = authority.issue("client")
    async with Server(with_tls(settings, authority, tls_client_ca=authority.ca), backend) as server:
        target = f"127.0.0.1:{server.port}"
        async with AsyncClient(target, tls=Tls(authority.ca, certificate, key)) as client:
            assert await client.engines()
        for tls in (Tls(authority.ca), Tls(authority.ca, *strangers.issue("client"))):
            async with AsyncClient(target, tls=tls) as client:
                with pytest.raises(UnavailableError, match="a certificate of yours"):
                    await client.engines(timeout=5)


def certificate_of(port: int) -> str:
    """The PEM certificate that a port shows."""
    return ssl.get_server_certificate(("127.0.0.1", port))


async def test_a_renewed_certificate_is_shown_without_a_restart_and_without_dropping_a_stream(
    settings: ServeSettings, backend: FakeBackend, authority: Authority
) -> None:
    backend.delay = 0.02
    async with Server(with_tls(settings, authority), backend) as server:
        first = await asyncio.to_thread(certificate_of, server.port)
        async with AsyncClient(f"127.0.0.1:{server.port}", tls=authority.ca) as client:
            running = asyncio.create_task(client.generate("a lake", steps=30))
            while server.admission.active == 0:
                await asyncio.sleep(0.01)
            certificate, key = authority.issue("server")
            second = await asyncio.to_thread(certificate_of, server.port)
            assert first != second
            assert second.strip() in certificate.read_text()
            # Half of an exchange: the key is another's now.
            key.write_bytes(key.read_bytes().replace(b"M", b"N", 3))
            assert await asyncio.to_thread(certificate_of, server.port) == second
            assert len(await running) == 1


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"tls_private_key": None}, "set the other one"),
        ({"tls_certificate": None}, "set the other one"),
        ({"tls_certificate": None, "tls_private_key": None, "tls_client_ca": "ca.pem"}, "tls_client_ca needs"),
        ({"tls_certificate": "ca.pem"}, "not a certificate and its key"),
        ({"tls_private_key": "server.pem"}, "not a certificate and its key"),
        ({"tls_private_key": "nowhere.pem"}, "cannot read"),
        ({"tls_client_ca": "server-key.pem"}, "no certificates in PEM"),
        ({"api_keys": "nowhere"}, "api_keys: cannot read"),
    ],
)
async def test_files_that_do_not_work_are_one_clear_message_at_start(
    settings: ServeSettings, authority: Authority, broken: dict[str, str | None], problem: str
) -> None:
    changes = {name: file and authority.ca.with_name(file) for name, file in broken.items()}
    with pytest.raises(ServerError, match=problem):
        async with Server(with_tls(settings, authority, **changes), FakeBackend()):
            pass


async def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(
    settings: ServeSettings, authority: Authority
) -> None:
    tls = with_tls(settings, authority)
    assert tls.tls_private_key is not None
    key = serialization.load_pem_private_key(tls.tls_private_key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"password")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    tls.tls_private_key.write_bytes(pem)
    with pytest.raises(ServerError, match="unencrypted"):
        async with Server(tls, FakeBackend()):
            pass


async def test_health_can_have_a_port_of_its_own_without_tls_and_keys(
    settings: ServeSettings, backend: FakeBackend, authority: Authority, keys: Path
) -> None:
    async with (
        Server(with_tls(settings, authority, health_port=0, api_keys=keys), backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "sdapi.v1.GenerationService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        error = await failure_of(GenerationServiceStub(channel), a_request())
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# Connections


@asynccontextmanager
async def counted(port: int) -> AsyncIterator[tuple[int, list[int]]]:
    """Another port in front of a port, and a list that grows by each connection."""
    connections: list[int] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections))
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, there_writer), copy(there_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as front:
        yield front.sockets[0].getsockname()[1], connections


async def test_an_old_connection_is_replaced_and_its_calls_go_on(settings: ServeSettings, backend: FakeBackend) -> None:
    backend.delay = 0.05
    aging = settings.model_copy(update={"max_connection_age_seconds": 0.5})
    async with (
        Server(aging, backend) as server,
        counted(server.port) as (port, connections),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        long = asyncio.create_task(events_of(stub, a_request(steps=40)))
        await asyncio.sleep(1.5)
        assert not long.done()
        assert (await events_of(stub, a_request(steps=1)))[-1].HasField("finished")
        assert (await long)[-1].HasField("finished")
    assert len(connections) > 1


async def test_an_old_connection_whose_grace_ends_is_cut(settings: ServeSettings, backend: FakeBackend) -> None:
    backend.delay = 0.05
    aging = settings.model_copy(update={"max_connection_age_seconds": 0.3, "max_connection_age_grace_seconds": 0.2})
    async with (
        Server(aging, backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        error = await failure_of(GenerationServiceStub(channel), a_request(steps=150))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.sleep(0.1)
        assert server.admission.active == 0
