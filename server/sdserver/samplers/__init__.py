"""Samplers by name: pure generators that take noise to an image. `query` says what they are given and what they ask."""

from __future__ import annotations

from inspect import signature

from sdserver.samplers.deterministic import dpm2, dpmpp_2m, euler, heun, lms, unipc
from sdserver.samplers.query import Query, Sampler, SamplerFunction
from sdserver.samplers.stochastic import (
    ddim,
    dpm2_ancestral,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler_ancestral,
    lcm,
)

__all__ = ["SAMPLERS", "Query", "Sampler", "SamplerFunction", "evaluations", "noise_options", "samplers_with"]

SAMPLERS: dict[str, SamplerFunction] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    # On the visited levels as if they were all levels: Euler ancestral, by its older name.
    "ddpm": euler_ancestral,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "lms": lms,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "lcm": lcm,
}

_TWO_EVALUATIONS_A_STEP: tuple[SamplerFunction, ...] = (heun, dpm2, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde)


def noise_options(name: str) -> dict[str, float]:
    """Those of `eta` and `churn` that a sampler has, with their defaults. Raises KeyError for an unknown name."""
    parameters = signature(SAMPLERS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def samplers_with(option: str) -> list[str]:
    """Names of the samplers that have a noise option, `eta` or `churn`."""
    return [name for name in SAMPLERS if option in noise_options(name)]


def evaluations(name: str, steps: int) -> int:
    """Evaluations that a sampler makes over `steps` steps down to sigma 0. Raises KeyError for an unknown name."""
    return 2 * steps - 1 if SAMPLERS[name] in _TWO_EVALUATIONS_A_STEP else steps
