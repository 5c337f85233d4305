"""TLS of the gRPC port: certificates from files, which may be renewed while the server runs."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import grpc

from sdserver.watched_files import FileError, WatchedFiles, read_file

if TYPE_CHECKING:
    from pathlib import Path


def server_credentials(certificate: Path, private_key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Credentials of PEM files: a chain with the server's certificate first, and its unencrypted key.

    With `client_ca`, clients need a certificate of one of its authorities, too. A handshake takes the files as they
    are then; connections that are open go on. Raises FileError.
    """
    paths = [path for path in (certificate, private_key, client_ca) if path is not None]
    files = WatchedFiles(paths, lambda: _configuration(certificate, private_key, client_ca))
    served = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake; None: as before."""
        nonlocal served
        before, served = served, files.current()
        return None if served is before else served

    return grpc.dynamic_ssl_server_credentials(
        served,
        changed,  # type: ignore[arg-type]  # its stub does not know None
        require_client_authentication=client_ca is not None,
    )


def _configuration(certificate: Path, private_key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, key = read_file(certificate), read_file(private_key)
    authorities = None if client_ca is None else read_file(client_ca)
    # gRPC says of a bad file only that it cannot listen.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Never asks for a password on the terminal.
        context.load_cert_chain(certificate, private_key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise FileError(
            f"{certificate} and {private_key} are not a certificate and its key ({_what(error)}): the first is PEM "
            "with the server's own certificate at its beginning, the second its unencrypted key in PEM"
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise FileError(f"{client_ca} holds no certificates in PEM ({_what(error)})") from error
    return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)


def _what(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
