"""Other ways to write what OpenVINO's CPU plugin is slow at while sizes are open; the numbers are the same but for
their rounding. Measured with OpenVINO 2026.4 in bf16 on two cores.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from openvino import opset14 as ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    import openvino
    from numpy.typing import NDArray

# Up to here a channel has too few places for a loop over them; beyond, to turn the array costs more than it saves.
FEW_PLACES = 256


def fold_norms(module: torch.nn.Module) -> None:
    """Puts what the norms of transformers multiply and add into the linear layers that follow them: W (g x + b) is
    (W g) x + W b. A pass over the array less, each time.

    The layers are changed in place.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for part in module.modules():
        if isinstance(part, Transformer2DModel):
            _fold(part.norm, part.proj_in)
        if isinstance(part, BasicTransformerBlock):
            attends = part.attn1
            _fold(part.norm1, attends.to_q, *(() if part.only_cross_attention else (attends.to_k, attends.to_v)))
            if part.attn2 is not None:
                _fold(part.norm2, part.attn2.to_q)
            _fold(part.norm3, part.ff.net[0].proj)


def _fold(norm: Any, *layers: Any) -> None:
    for layer in layers:
        weight, bias = layer.weight.detach(), layer.bias
        shift = torch.tensordot(weight, norm.bias.detach(), ([1], [0])).flatten()
        layer.bias = torch.nn.Parameter(shift if bias is None else bias.detach() + shift, requires_grad=False)
        scale = norm.weight.detach().reshape(1, -1, *(1 for _ in weight.shape[2:]))
        layer.weight = torch.nn.Parameter(weight * scale, requires_grad=False)
    norm.weight = torch.nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    norm.bias = torch.nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False)


class SplitGate(torch.nn.Module):
    """diffusers' GEGLU with two linear layers for the halves of its one: no copies of halves, and the GELU becomes part
    of its layer. A step takes 0.96 of the time, at SD 2.1's size and the shipped engine's."""

    def __init__(self, gate: torch.nn.Linear) -> None:
        super().__init__()
        (self.value_weight, self.gate_weight), (self.value_bias, self.gate_bias) = (
            part.detach().chunk(2) for part in (gate.weight, gate.bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] to [..., F]."""
        linear = torch.nn.functional.linear
        gate = torch.nn.functional.gelu(linear(x, self.gate_weight, self.gate_bias))
        return linear(x, self.value_weight, self.value_bias) * gate


def split_gates(module: torch.nn.Module) -> None:
    """Puts `SplitGate` in the place of each GEGLU."""
    from diffusers.models.activations import GEGLU

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GEGLU):
                setattr(parent, name, SplitGate(child.proj))


def rewrite_norms(model: openvino.Model, shapes: Sequence[Sequence[int]]) -> None:
    """Scales, shifts and activates the channels of group norms of few places with the channels last: a step of the
    shipped engine, whose images are small, takes 0.83 of the time. Leaves out the ones and zeros of `fold_norms`.

    Places are those (FEW_PLACES at most) that there are where the model's inputs have `shapes`, with which it is left.
    """
    model.reshape({place: list(shape) for place, shape in enumerate(shapes)})
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        _, channels, height, width = node.get_output_shape(0)
        if _is(node.input_value(1), 1) and _is(node.input_value(2), 0):
            _replace(node, _normal(node))
        elif height * width <= FEW_PLACES:
            _with_channels_last(node, channels)
    model.validate_nodes_and_infer_types()


def upsample_by_phases(model: openvino.Model) -> None:
    """Convolves what was enlarged twofold, by its nearest neighbours, before it is enlarged: each of the four phases of
    the larger picture sees 2 x 2 places of the small one, under sums of the kernel's 3 x 3 weights. That is 4/9 of the
    work, and a step takes 0.95 of the time (Shi et al. 2016, arXiv:1609.05158, of sub-pixel convolution).
    """
    for convolution in model.get_ordered_ops():
        if convolution.get_type_name() != "Convolution":
            continue
        enlarging = convolution.input_value(0).get_node()
        if enlarging.get_type_name() == "Interpolate":
            _by_phases(convolution, enlarging.input_value(0))
    model.validate_nodes_and_infer_types()


def _by_phases(convolution: openvino.Node, small: openvino.Output) -> None:
    weights: NDArray[np.float32] = convolution.input_value(1).get_node().get_data()
    (biased,) = (follower.get_node() for follower in convolution.output(0).get_target_inputs())
    bias = biased.input_value(1)
    phases = []
    for down, right in product((0, 1), (0, 1)):
        kernel = _phase(_phase(weights, 2, down), 3, right)
        phase = ops.convolution(small, kernel, [1, 1], [1 - down, 1 - right], [down, right], [1, 1])
        phases.append(ops.add(phase, bias))
    enlarged = ops.depth_to_space(ops.concat(phases, 1), "blocks_first", 2)
    _replace(biased, enlarged)


def _phase(weights: NDArray[np.float32], axis: int, phase: int) -> NDArray[np.float32]:
    """Two weights of three along an axis: of the places that are one place of the small picture, their sum."""
    before, same, after = np.split(weights, 3, axis)
    pair = (before + same, after) if phase else (before, same + after)
    return np.concatenate(pair, axis)


def _normal(norm: openvino.Node) -> openvino.Node:
    """A group norm before it scales and shifts."""
    x, (groups, epsilon) = norm.input_value(0), (norm.get_attributes()[name] for name in ("num_groups", "epsilon"))
    # 0 is the size that there is, -1 what is left.
    grouped = ops.reshape(x, np.array([0, groups, -1]), special_zero=True)
    return ops.reshape(ops.mvn(grouped, np.array([2]), True, epsilon, "inside_sqrt"), ops.shape_of(x), False)


def _with_channels_last(norm: openvino.Node, channels: int) -> None:
    last = ops.transpose(_normal(norm), np.array([0, 2, 3, 1]))
    scale, shift = (ops.reshape(norm.input_value(i), np.array([1, 1, 1, channels]), False) for i in (1, 2))
    result, replaced = ops.add(ops.multiply(last, scale), shift), norm
    followers = norm.output(0).get_target_inputs()
    if len(followers) == 1 and (only := next(iter(followers)).get_node()).get_type_name() == "Swish":
        result, replaced = ops.swish(result), only
    _replace(replaced, ops.transpose(result, np.array([0, 3, 1, 2])))


def _replace(node: openvino.Node, by: openvino.Node) -> None:
    for follower in node.output(0).get_target_inputs():
        follower.replace_source_output(by.output(0))


def _is(constant: openvino.Output, number: float) -> bool:
    return bool((constant.get_node().get_data() == number).all())
