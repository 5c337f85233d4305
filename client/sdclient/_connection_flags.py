"""The flags of `sdclient` that say which server, and how to reach it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ._types import Tls

if TYPE_CHECKING:
    import argparse

    from ._sync import Client


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, whose defaults are environment variables. `connect` makes a client of what is read."""
    option = parser.add_argument_group("server").add_argument
    environment = os.environ.get
    server = environment("SDCLIENT_SERVER", "localhost:50051")
    option("--server", default=server, metavar="HOST:PORT", help="default: $SDCLIENT_SERVER, or localhost:50051")
    option(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the API key; default: the key itself is $SDCLIENT_API_KEY",
    )
    option(
        "--tls",
        nargs="?",
        const="1",
        default=environment("SDCLIENT_TLS", ""),
        metavar="CA.PEM",
        help="use TLS, with these authorities or the public ones; default: $SDCLIENT_TLS, a file, 1 or 0",
    )
    option(
        "--tls-certificate",
        default=environment("SDCLIENT_TLS_CERTIFICATE"),
        metavar="FILE",
        help="certificate to show to a server that wants one; default: $SDCLIENT_TLS_CERTIFICATE",
    )
    option(
        "--tls-private-key",
        default=environment("SDCLIENT_TLS_PRIVATE_KEY"),
        metavar="FILE",
        help="its private key; default: $SDCLIENT_TLS_PRIVATE_KEY",
    )


def connect(arguments: argparse.Namespace) -> Client:
    """A client as the flags say. Raises OSError for unreadable files, ValueError for half a certificate."""
    from ._sync import Client

    return Client(arguments.server, api_key=_api_key(arguments.api_key_file), tls=_tls(arguments))


def _api_key(file: Path | None) -> str | None:
    return os.environ.get("SDCLIENT_API_KEY") if file is None else file.read_text().strip()


def _tls(arguments: argparse.Namespace) -> Tls | bool:
    chosen, certificate, private_key = arguments.tls, arguments.tls_certificate, arguments.tls_private_key
    if chosen in ("", "0"):
        if certificate is not None or private_key is not None:
            raise ValueError("--tls-certificate and --tls-private-key need --tls")
        return False
    return Tls(None if chosen == "1" else chosen, certificate, private_key)
