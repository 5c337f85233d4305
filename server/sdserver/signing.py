"""Content Credentials: C2PA manifests (https://spec.c2pa.org) that say, signed, that a picture was generated."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from sdserver.metadata import SOFTWARE, VERSION

if TYPE_CHECKING:
    from pathlib import Path

# Nothing is fetched, and no thumbnail is added: the picture itself is at hand.
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


class SigningError(Exception):
    """The settings for signing do not work; says what to change. Holds nothing of the key."""


class Signer:
    """Signs files with an operator's key. Any number of threads may sign at a time."""

    def __init__(
        self, certificates: Path, private_key: Path, algorithm: str, timestamp_authority: str | None = None
    ) -> None:
        """`certificates` is a PEM chain, the signer's own first; `private_key` its key as unencrypted PKCS #8 PEM.

        Signs and checks a picture, so that what cannot work fails here. Raises SigningError.
        """
        try:
            import c2pa
        except ImportError as error:
            raise SigningError("signing needs c2pa-python: pip install 'sd-service[server,c2pa]'") from error
        self._c2pa = c2pa
        chain, key = (_read(path) for path in (certificates, private_key))
        try:
            self._context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, key, timestamp_authority))
            problems = self._problems(self.sign(_a_picture(), "image/png", "", SOFTWARE, VERSION))
        except c2pa.C2paError as error:
            # Its messages say what is wrong, and quote nothing of the files.
            problems = [str(error)]
        if problems:
            raise SigningError(
                f"cannot sign with {certificates} and {private_key} by {algorithm} ({', '.join(problems)}): the chain "
                "is PEM with the signer's certificate first, which is still valid and for emailProtection or another "
                "purpose that C2PA allows; the key is the signer's, unencrypted PKCS #8 PEM, and fits the algorithm"
            )

    def sign(self, data: bytes, media_type: str, source_type: str, agent: str, agent_version: str) -> bytes:
        """The file with a manifest: created by `agent`, in a way that `source_type` names (an IPTC NewsCode)."""
        manifest = {
            "claim_generator_info": [{"name": SOFTWARE, "version": VERSION}],
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": source_type,
                                "softwareAgent": {"name": agent, "version": agent_version},
                            }
                        ]
                    },
                }
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(manifest, context=self._context) as builder:
            builder.sign(self._signer, media_type, io.BytesIO(data), signed)
        return signed.getvalue()

    def _problems(self, data: bytes) -> list[str]:
        """What is wrong with a signed PNG. Who trusts whom is not asked: that is for those who read it."""
        with self._c2pa.Reader("image/png", io.BytesIO(data), context=self._context) as reader:
            if reader.get_validation_state() in ("Valid", "Trusted"):
                return []
            results = reader.get_validation_results() or {}
        failures = results.get("activeManifest", {}).get("failure", [])
        return [failure["code"] for failure in failures if failure["code"] != "signingCredential.untrusted"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SigningError(f"cannot read {path}: {error.strerror}") from error


def _a_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
