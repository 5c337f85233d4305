"""What a sampler asks of an image: x0, the picture that the models see behind a noisy one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.guidance import rescaled
from sdserver.parameterization import c_in, denoised
from sdserver.step_scheduler import Row

if TYPE_CHECKING:
    from sdserver.guidance import Guidance
    from sdserver.request import GenerationRequest
    from sdserver.samplers import Query
    from sdserver.step_scheduler import StepScheduler

Array = NDArray[np.float32]


class Denoiser:
    """Answers the queries of one image of a request."""

    def __init__(self, request: GenerationRequest, guidance: Guidance, scheduler: StepScheduler) -> None:
        self._request = request
        self._guidance = guidance
        self._scheduler = scheduler
        self.unet_rows = 0
        """UNet rows computed so far."""
        self.pixel_steps = 0
        """Pixels of the generated size, summed over them."""

    async def __call__(self, query: Query) -> Array:
        """[C, h, w] x0 as the sum of the rows' predictions; rows that add nothing are not computed."""
        request, guidance, engine = self._request, self._guidance, self._request.engine
        forms = [guidance.coefficients(query.step, request.steps)]
        if request.guidance_rescale != 0 and forms[0] != guidance.conditional:
            forms.append(guidance.conditional)
        weights = np.array(forms, np.float32)
        used = np.flatnonzero(weights.any(axis=0))
        predictions = await self._predict(query, guidance.text_states[used])
        # x0 is affine in the prediction and the weights sum to 1, so guiding the predictions is guiding x0.
        prediction, *conditional = np.tensordot(weights[:, used], predictions, axes=1)
        if conditional:
            prediction = rescaled(prediction, conditional[0], request.guidance_rescale)
        return denoised(prediction, query.x, query.sigma, engine.prediction_type)

    async def _predict(self, query: Query, text_states: Array) -> Array:
        """[R, C, h, w] predictions of the UNet under text states [R, tokens, width]."""
        engine = self._request.engine
        timestep = engine.noise_schedule.timestep(query.sigma)
        latents = query.x * c_in(query.sigma)
        rows = [Row(latents, timestep, states) for states in text_states]
        predictions = await self._scheduler.predict(rows)
        self.unet_rows += len(rows)
        self.pixel_steps += len(rows) * latents[0].size * engine.latents.downsampling**2
        return predictions
