"""What a sampler asks of an image: x0, the picture that the models see behind a noisy one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.clip_guidance import GradientRow, steered, variance
from sdserver.guidance import rescale_factor
from sdserver.parameterization import c_in, denoised, denoised_by
from sdserver.step_scheduler import Row
from sdserver.windows import Cover, Grid, cover, worthwhile_cover

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.block_cache import BlockCache
    from sdserver.clip_guidance import ClipGuide
    from sdserver.guidance import Guidance
    from sdserver.lora_rows import LoraRows
    from sdserver.request import GenerationRequest
    from sdserver.samplers import Query
    from sdserver.step_scheduler import StepScheduler

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Form:
    """How predictions under R text states, each [tokens, width], become the guided one and, for guidance rescale, the
    conditional one: weights [1 or 2, R]. `rows` are the text states' places in `Guidance.text_states`."""

    rows: Sequence[int]
    weights: Array
    text_states: Sequence[Array]


class Denoiser:
    """Answers the queries of one pass of an image."""

    def __init__(
        self,
        request: GenerationRequest,
        guidance: Guidance,
        scheduler: StepScheduler | LoraRows,
        clip: ClipGuide | None = None,
        cache: BlockCache | None = None,
        conditioning: Array | None = None,
    ) -> None:
        """`conditioning` [E, h, w]: the channels that the UNet takes after those of the latents."""
        self._request = request
        self._guidance = guidance
        self._scheduler = scheduler
        self._clip = clip
        self._cache = cache
        self._conditioning = conditioning
        self._forms: dict[tuple[float, ...], _Form] = {}
        self._windows: Grid | None = None
        self.unet_rows = 0
        """UNet rows computed so far."""
        self.pixel_steps = 0
        """Pixels of the generated size, summed over them."""

    @property
    def cached_rows(self) -> int:
        """Those of them of which block caching left out the inner blocks."""
        return 0 if self._cache is None else self._cache.rows

    @property
    def clip_gradients(self) -> int:
        """Gradients of CLIP guidance computed so far."""
        return 0 if self._clip is None else self._clip.gradients

    async def __call__(self, query: Query) -> Array:
        """[C, h, w] x0 as the sum of the rows' predictions; rows that add nothing are not computed."""
        request, engine = self._request, self._request.engine
        form = self._form(self._guidance.coefficients(query.step, request.steps))
        predictions = await self._predict(query, form)
        # x0 is affine in the prediction and the weights sum to 1, so guiding the predictions is guiding x0.
        flat = np.dot(form.weights, predictions.reshape(len(predictions), -1))
        prediction, *conditional = flat.reshape(-1, *predictions.shape[1:])
        factor = 1.0
        if conditional:
            factor = rescale_factor(prediction, conditional[0], request.guidance_rescale)
            prediction = factor * prediction
        x0 = denoised(prediction, query.x, query.sigma, engine.prediction_type)
        clip = self._clip
        # What is not finite has no gradient; it fails where the image ends.
        if clip is None or not clip.acts_in(query.step, request.steps) or not np.isfinite(x0).all():
            return x0
        gradient = await clip.gradient(query.step, x0)
        if clip.unet_gradients is None:
            shift = variance(query.sigma) * gradient
        else:
            row_weights = np.float32(factor) * form.weights[0]
            pulled_back = await self._pull_back(query, form.text_states, row_weights, gradient)
            shift = query.sigma**2 * pulled_back
        return steered(x0, gradient, shift, query.sigma, clip.options.scale)

    def _form(self, coefficients: tuple[float, ...]) -> _Form:
        form = self._forms.get(coefficients)
        if form is None:
            conditional = self._guidance.conditional
            rescaled = self._request.guidance_rescale != 0 and coefficients != conditional
            weights = np.array([coefficients, conditional] if rescaled else [coefficients], np.float32)
            used = np.flatnonzero(weights.any(axis=0))
            form = _Form(used.tolist(), weights[:, used], [self._guidance.text_states[row] for row in used])
            self._forms[coefficients] = form
        return form

    async def _predict(self, query: Query, form: _Form) -> Array:
        """[R, C, h, w] predictions of the UNet under the R text states of `form`, window by window.

        Blending predictions is blending x0, which is affine in them at one noise level.
        """
        engine = self._request.engine
        timestep = engine.noise_schedule.timestep(query.sigma)
        grid = self._grid(query.x)
        parts = self._inputs(query, grid)
        rows = [Row(part, timestep, states) for states in form.text_states for part in parts]
        if self._cache is None:
            predictions = await self._scheduler.predict(rows, self._request.tenant)
        else:
            keys = list(product(form.rows, range(len(parts))))
            predictions = await self._cache.predict(query.step, rows, keys)
        self.unet_rows += len(rows)
        self.pixel_steps += len(rows) * parts[0][0].size * engine.latents.downsampling**2
        if grid.whole:
            return predictions
        return np.stack([grid.join(each) for each in np.split(predictions, len(form.text_states))])

    def _inputs(self, query: Query, grid: Grid) -> list[Array]:
        """[U, h, w] what the UNet sees of each window."""
        latents = [part * c_in(query.sigma) for part in grid.split(query.x)]
        if self._conditioning is None:
            return latents
        return [np.concatenate(each) for each in zip(latents, grid.split(self._conditioning), strict=True)]

    def _grid(self, latents: Array) -> Grid:
        """The windows in which the UNet sees latents [C, h, w], which are of the same size in all queries."""
        if self._windows is None:
            _, height, width = latents.shape
            self._windows = Grid(self._cover(height, self._request.tile_y), self._cover(width, self._request.tile_x))
        return self._windows

    def _cover(self, length: int, ring: bool) -> Cover:
        windows, scale = self._request.windows, self._request.engine.latents.downsampling
        if windows is None:
            return cover(length, length, 0, ring=ring)
        return worthwhile_cover(length, windows.size // scale, windows.overlap // scale, ring=ring)

    async def _pull_back(self, query: Query, text_states: Sequence[Array], weights: Array, gradient: Array) -> Array:
        """[C, h, w] the gradient by `query.x`, of the gradient [C, h, w] by x0 that `_predict` and weights [R] led to.

        The factor of `guidance_rescale` is taken for constant.
        """
        engine, scale = self._request.engine, c_in(query.sigma)
        timestep = engine.noise_schedule.timestep(query.sigma)
        grid = self._grid(query.x)
        parts = list(zip(self._inputs(query, grid), grid.weighted(grid.split(gradient)), strict=True))
        rows = [
            GradientRow(part, timestep, states, weight * share)
            for states, weight in zip(text_states, weights, strict=True)
            for part, share in parts
        ]
        assert self._clip is not None
        assert self._clip.unet_gradients is not None
        gradients = await self._clip.unet_gradients.predict(rows, self._request.tenant)
        self.pixel_steps += len(rows) * rows[0].latents[0].size * engine.latents.downsampling**2
        c_skip, c_out = denoised_by(query.sigma, engine.prediction_type)
        total = grid.sum(gradients.reshape(len(text_states), len(grid), *gradients.shape[1:]).sum(axis=0))
        return c_skip * gradient + c_out * scale * total
