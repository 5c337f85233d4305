"""The text `parameters` that A1111's web UI writes into its images and people's tools read.

Three parts, a line each: the prompt, `Negative prompt: ...`, and the settings. It has no words for several prompts that
share an image but `AND`, which stands for composable diffusion; text-encoder blending is written with it, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdserver.request import GenerationRequest, Prompt

_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "ddpm": "DDPM",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "lcm": "LCM",
}
_SCHEDULES = {"native": "Uniform", "karras": "Karras", "exponential": "Exponential"}

# Signs that A1111's emphasis would take for its own.
_SIGN = re.compile(r"[\\()\[\]]")
# White space that would break the text into other lines, and characters that no tool shows.
_INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# What `AND` takes for a weight.
_WEIGHT_AT_END = re.compile(r":\s*[-+]?[.\d]+\s*$")

SHORTENED = " [shortened; this file's XMP has all of it]"


def parameters(request: GenerationRequest, version: str, most_units: int | None = None) -> str:
    """The text for a request of one image.

    `most_units`: where the text is longer, in UTF-16 code units, its prompts are shortened and say so.
    """
    settings = _settings(request, version)
    parts = list(_prompts(request))
    if most_units is not None and _units("\n".join([*parts, settings])) > most_units:
        room = (most_units - _units(settings) - len(parts)) // len(parts) - len(SHORTENED)
        parts = [part if _units(part) <= room else _cut(part, room) + SHORTENED for part in parts]
    return "\n".join([*parts, settings])


def _prompts(request: GenerationRequest) -> list[str]:
    composable = request.blending == "composable"
    positive = [prompt for prompt in request.prompts if prompt.weight > 0 or (composable and prompt.weight < 0)]
    negative = [prompt for prompt in request.prompts if prompt.weight < 0 and not composable]
    total = sum(prompt.weight for prompt in positive)
    loras = [f"<lora:{lora.info.name}:{lora.weight:.6g}>" for lora in request.loras]
    shares = [prompt.weight if composable else prompt.weight / total for prompt in positive]
    shown = " AND ".join(
        _weighted(prompt, share, len(positive)) for prompt, share in zip(positive, shares, strict=True)
    )
    lines = [" ".join(filter(None, [shown, *loras]))]
    if negative:
        # How far the unconditional branch moves towards the negatives: see `guidance.blend`.
        moved = min(1.0, -sum(prompt.weight for prompt in negative) / (total or 1.0))
        text = ", ".join(_text(prompt) for prompt in negative)
        lines.append(f"Negative prompt: {text if moved == 1 else f'({text}:{moved:.3g})'}")
    return lines


def _weighted(prompt: Prompt, share: float, count: int) -> str:
    text = _text(prompt)
    return f"{text} :{share:.3g}" if (count > 1 or share < 0 or _WEIGHT_AT_END.search(text)) else text


def _text(prompt: Prompt) -> str:
    """The prompt with A1111's signs for its emphasis, on one line."""
    parts, position = [], 0
    for emphasis in prompt.emphasis:
        parts.append(_escaped(prompt.text[position : emphasis.start]))
        parts.append(f"({_escaped(prompt.text[emphasis.start : emphasis.end])}:{emphasis.factor:.6g})")
        position = emphasis.end
    parts.append(_escaped(prompt.text[position:]))
    return _INVISIBLE.sub(" ", "".join(parts)).strip()


def _escaped(text: str) -> str:
    return _SIGN.sub(lambda sign: f"\\{sign[0]}", text)


def _settings(request: GenerationRequest, version: str) -> str:
    two_pass, variation, init_image = request.two_pass, request.variation, request.init_image
    size = f"{request.width}x{request.height}"
    settings: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": _SAMPLERS[request.sampler],
        "Schedule type": _SCHEDULES[request.schedule],
        "CFG scale": f"{request.guidance_scale:.6g}",
        "Seed": request.seeds[0],
        "Size": f"{two_pass.width}x{two_pass.height}" if two_pass else size,
        "Model": request.engine.id,
    }
    if request.eta is not None:
        settings["Eta DDIM" if request.sampler == "ddim" else "Eta"] = f"{request.eta:.6g}"
    if request.churn:
        settings["Sigma churn"] = f"{request.churn:.6g}"
    if variation:
        settings["Variation seed"] = variation.seed
        settings["Variation seed strength"] = f"{variation.strength:.6g}"
    if init_image:
        settings["Denoising strength"] = f"{init_image.strength:.6g}"
    if request.mask:
        settings["Mask blur"] = f"{request.mask.feather:.6g}"
    if two_pass:
        settings["Denoising strength"] = f"{two_pass.strength:.6g}"
        settings["Hires resize"] = size
    if request.tile_x and request.tile_y:
        settings["Tiling"] = True
    settings["Version"] = version
    return ", ".join(f"{name}: {value}" for name, value in settings.items())


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def _cut(text: str, units: int) -> str:
    return text.encode("utf-16-be")[: 2 * units].decode("utf-16-be", "ignore")
