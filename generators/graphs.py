"""StyleGAN2's synthesis as an ONNX graph, written node by node, for `encoder.graphs`.

    graph = Graph(torch.float32)
    ws = graph.input("ws", ("B", face.num_ws, face.w_dim))
    drawn = synthesis(graph, SwappedSynthesis(face, anime, 16), ws, both=True)    # {name: value}
    model = graph.model({"ws": …})                       # an onnx.ModelProto, of any batch size

The numbers are those of `generators.stylegan2` to rounding. The form is the fastest found for ONNX
Runtime on a CPU: weights are constants, styles scale activations. Noise is constant.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, I / O channels in / out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generators.blocks import RECONSTRUCTION, SwappedSynthesis
from generators.latents import SHARED, StyleLimit
from generators.ops import LRELU_GAIN, LRELU_SLOPE, fir_kernel
from generators.stylegan2 import SynthesisBlock, SynthesisLayer, SynthesisNetwork, ToRGB

OPSET = 18  # read by ONNX Runtime, onnxruntime-web and OpenVINO of the last years
IR_VERSION = 10
WORTH_HALVING = 512  # numbers of a constant from which on half precision saves anything
NAMES = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}


def onnx_packages() -> Any:
    """The package onnx; ValueError, a sentence, where it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError(
            "The package onnx is missing; pip install 'amortized-gan-inversion[onnx]' brings it."
        ) from error
    return onnx


class Graph:
    """Nodes, constants, inputs and outputs on their way to an onnx.ModelProto.

    Activations of the heavy part are of `dtype`, float32 or float16; a value is known by its name.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        parent: Graph | None = None,
        *,
        transposed: bool = False,  # upsampling by ConvTranspose: smaller, and faster in WebAssembly
    ) -> None:
        self.onnx = onnx_packages()
        self.dtype, self.transposed = dtype, transposed
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.counter: list[int] = [0] if parent is None else parent.counter  # one for all scopes

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; the name of its result, or a tuple of names."""
        names = [self.name(op.lower()) for _ in range(outputs)]
        # named as its result: old versions of ONNX Runtime mix up what they make of nameless nodes
        node = self.onnx.helper.make_node(op, list(inputs), names, names[0], **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else tuple(names)

    def name(self, stem: str) -> str:
        self.counter[0] += 1
        return f"g.{stem}{self.counter[0]}"  # no name of another exporter

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """A tensor, or whole numbers; floats become `dtype`, or float32."""
        if isinstance(value, Tensor):
            array = value.detach().cpu().to(dtype or torch.float32).numpy()
        else:
            array = np.asarray(value)
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            if dtype == torch.float16:
                array = array.astype(np.float16)
        name = self.name("c")
        self.constants[name] = np.array(array, order="C")  # contiguous, a number stays one
        return name

    def cast(self, x: str, dtype: torch.dtype) -> str:
        """Between float32 and the graph's precision; nothing where they are the same."""
        if self.dtype == torch.float32:
            return x
        return self("Cast", x, to=getattr(self.onnx.TensorProto, NAMES[dtype]))

    def input(self, name: str, shape: Sequence[int | str], kind: str = "FLOAT") -> str:
        self.inputs.append(self._info(name, shape, kind))
        return name

    def output(self, name: str, x: str, shape: Sequence[int | str], kind: str = "FLOAT") -> None:
        self.nodes.append(self.onnx.helper.make_node("Identity", [x], [name]))
        self.outputs.append(self._info(name, shape, kind))

    def _info(self, name: str, shape: Sequence[int | str], kind: str) -> Any:
        kind = getattr(self.onnx.TensorProto, kind)
        return self.onnx.helper.make_tensor_value_info(name, kind, list(shape))

    def proto(self, name: str) -> Any:
        """The onnx.GraphProto of what was added."""
        constants = [self.onnx.numpy_helper.from_array(v, k) for k, v in self.constants.items()]
        return self.onnx.helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, initializer=constants
        )

    def model(self, name: str, metadata: Mapping[str, Any] | None = None) -> Any:
        """The onnx.ModelProto; metadata: texts, or what JSON can say."""
        opset = [self.onnx.helper.make_opsetid("", OPSET)]
        model = self.onnx.helper.make_model(
            self.proto(name), opset_imports=opset, ir_version=IR_VERSION
        )
        return describe(model, metadata)


def describe(model: Any, metadata: Mapping[str, Any] | None) -> Any:
    """The model with texts, or what JSON can say, as its metadata."""
    onnx = onnx_packages()
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    model.producer_name = "amortized-gan-inversion"
    onnx.helper.set_model_props(model, texts)
    return model


def halve_weights(model: Any) -> Any:
    """In place: large constants stored in half precision, each with a cast back to float32 before
    its use, which runtimes do once, at loading. Arithmetic stays float32. ValueError for a value
    beyond half precision."""
    onnx = onnx_packages()
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < WORTH_HALVING:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if np.abs(values).max() > 65504:
            raise ValueError(f"{tensor.name} has values beyond half precision; take --dtype fp32.")
        name, tensor_name = tensor.name, f"{tensor.name}_half"
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor_name))
        casts.append(onnx.helper.make_node("Cast", [tensor_name], [name], to=1))
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *kept])
    return model


# ------------------------------------------------------------------------- the synthesis


def synthesis(
    graph: Graph,
    network: SwappedSynthesis,
    ws: str,
    both: bool,
    colours: str = "",  # a number as in the network's call; none: 0
    swap_resolution: int | None = None,  # None: the network's own
    styles: Sequence[str] | None = None,  # None: all
    drawing_ws: str = "",  # (B, L, D) of the drawn blocks; none: `ws`
) -> dict[str, str]:
    """ws (B, L, D) -> {style: (B, 3, R, R)} and, with `both`, the reconstruction, float32 in
    [-1, 1]; the early blocks are there once."""
    swap = network.swap_resolution if swap_resolution is None else swap_resolution
    first = network.limit.first_of[swap]
    drawn = limited(graph, network.limit, drawing_ws or ws, first, colours)
    if drawing_ws and network.face.spatial:  # which is no style
        drawn = joined(graph, (drawn, ws), (0, network.face.layers, network.face.num_ws))
    x = image = ""
    for r in (r for r in network.resolutions if r < swap):
        x, image = block(graph, network.face, r, x, image, ws)
    names = network.styles if styles is None else styles
    parts = [(name, network.tail(name), drawn) for name in names]
    parts += [(RECONSTRUCTION, network.face, ws)] if both else []
    pictures = {}
    for name, part, codes in parts:
        y, picture = x, image
        for r in (r for r in network.resolutions if r >= swap):
            y, picture = block(graph, part, r, y, picture, codes)
        pictures[name] = clipped(graph, picture, 1.0)
    return pictures


def limited(graph: Graph, limit: StyleLimit, ws: str, first: int, colours: str = "") -> str:
    """`generators.latents.StyleLimit`: (B, L, D) -> the same, for the drawing's blocks."""
    if limit.infinite and not colours:
        return ws
    mean, late = graph.constant(limit.mean), ws
    if limit.layers < limit.num_ws:  # what follows the layers is no style
        late = joined(graph, (ws,), (0, limit.layers))
    if not limit.infinite:
        axes, bound = graph.constant(limit.axes), graph.constant(limit.bound)
        along = graph("MatMul", graph("Sub", late, mean), axes)
        along = graph("Max", graph("Min", along, bound), graph("Neg", bound))
        within = graph("Add", mean, graph("MatMul", along, graph.constant(limit.axes.T)))
        average = graph("ReduceMean", within, graph.constant([1]), keepdims=1)
        own, shared = graph.constant(1 - SHARED), graph.constant(SHARED)
        late = graph("Add", graph("Mul", within, own), graph("Mul", average, shared))  # (B, L, D)
    if colours:
        late = graph("Add", late, graph("Mul", graph("Sub", mean, late), colours))
    if first == 0 and limit.layers == limit.num_ws:
        return late
    return joined(graph, (ws, late, ws), (0, first, limit.layers, limit.num_ws))


def joined(graph: Graph, values: Sequence[str], ends: Sequence[int]) -> str:
    """Rows ends[0] to ends[1] of the first of values (B, L, D), ends[1] to ends[2] of the next …"""
    places = [graph.constant([end]) for end in ends]
    parts = zip(values, places[:-1], places[1:], strict=True)
    rows = [graph("Slice", x, *between, graph.constant([1])) for x, *between in parts]
    return graph("Concat", *rows, axis=1) if rows[1:] else rows[0]


def block(
    graph: Graph, network: SynthesisNetwork, resolution: int, x: str, image: str, ws: str
) -> tuple[str, str]:
    """One resolution: features x and image, empty before the first block, to the next ones."""
    part: Any = network.get_submodule(f"b{resolution}")
    assert isinstance(part, SynthesisBlock)
    index = 2 * network.resolutions.index(resolution) - 1  # of the block's first w
    if part.first:
        x = graph.constant(part.const[None], graph.dtype)  # (1, C, 4, 4)
    else:
        x = layer(graph, part.conv0, x, row(graph, ws, index), resolution)
    x = layer(graph, part.conv1, x, row(graph, ws, index + 1), resolution)
    rgb = to_rgb(graph, part.torgb, x, row(graph, ws, index + 2), resolution)
    if part.has_spatial:
        code = joined(graph, (ws,), (network.layers, network.num_ws))
        code = graph("Reshape", code, graph.constant([-1, network.spatial, *[resolution] * 2]))
        code = convolved(graph, graph.cast(code, graph.dtype), part.spatial.weight)
        x = graph("Add", x, code)
    return x, graph("Add", upsampled(graph, image), rgb) if image else rgb


def row(graph: Graph, ws: str, index: int) -> str:
    """w (B, D) of one layer."""
    return graph("Gather", ws, graph.constant(np.int64(index)), axis=1)


def affine(graph: Graph, linear: Any, w: str, gain: float = 1.0) -> str:
    """w (B, D) -> styles (B, I)."""
    weight = graph.constant(linear.weight.T * linear.weight_gain * gain)
    return graph("Gemm", w, weight, graph.constant(linear.bias * linear.bias_gain * gain))


def layer(graph: Graph, part: SynthesisLayer, x: str, w: str, resolution: int) -> str:
    """Styles, 3x3 convolution, demodulation, noise, bias, leaky relu: (B, I, ·, ·) ->
    (B, O, R, R). See `generators.ops.modulated_conv`, for the half precision too."""
    weight = part.weight.detach()
    styles = affine(graph, part.affine, w)  # (B, I)
    if graph.dtype != torch.float32:
        largest = graph("ReduceMax", graph("Abs", styles), graph.constant([1]), keepdims=1)
        largest = graph("Max", largest, graph.constant(1e-6))
        root = graph.constant(math.sqrt(weight[0].numel()))
        styles = graph("Div", styles, graph("Mul", largest, root))
    squares = graph.constant(weight.square().sum(dim=(2, 3)).T)  # (I, O)
    power = graph("MatMul", graph("Mul", styles, styles), squares)
    root = graph("Sqrt", graph("Add", power, graph.constant(1e-8)))
    scale = graph("Div", graph.constant(LRELU_GAIN), root)  # (B, O)

    x = graph("Mul", x, as_map(graph, styles))
    y = doubled(graph, x, weight) if part.up else convolved(graph, x, weight, pads=[1] * 4)
    y = graph("Mul", y, as_map(graph, scale))
    shift = graph.constant(part.bias[:, None, None] * LRELU_GAIN, graph.dtype)
    strength = float(part.noise_strength) * LRELU_GAIN
    if strength:
        noise = graph.constant(part.noise_const[None] * strength, graph.dtype)  # (1, R, R)
        if len(part.bias) * resolution**2 <= 1 << 18:  # one sum of constants, one pass less
            y = graph("Add", y, graph("Add", noise, shift))
        else:
            y = graph("Add", graph("Add", y, noise), shift)
    else:
        y = graph("Add", y, shift)
    y = graph("LeakyRelu", y, alpha=LRELU_SLOPE)
    return y if part.clamp is None else clipped(graph, y, part.clamp, graph.dtype)


def as_map(graph: Graph, x: str) -> str:
    """(B, C) float32 -> (B, C, 1, 1) in the graph's precision."""
    return graph("Unsqueeze", graph.cast(x, graph.dtype), graph.constant([2, 3]))


def convolved(graph: Graph, x: str, weight: Tensor, **attributes: Any) -> str:
    return graph("Conv", x, graph.constant(weight, graph.dtype), **attributes)


def doubled(graph: Graph, x: str, weight: Tensor) -> str:
    """The transposed convolution of stride 2 and the FIR filter: (B, I, H, W) -> (B, O, 2H, 2W)."""
    filters = graph.constant(weight.transpose(0, 1), graph.dtype)
    wide = graph("ConvTranspose", x, filters, strides=[2, 2])  # (B, O, 2H + 1, 2W + 1)
    fir = fir_kernel(len(weight), 4, weight)
    return convolved(graph, wide, fir, pads=[1] * 4, group=len(weight))


def to_rgb(graph: Graph, part: ToRGB, x: str, w: str, resolution: int) -> str:
    """(B, C, R, R) -> (B, 3, R, R), float32."""
    styles = affine(graph, part.affine, w, part.weight_gain)
    styles = graph("Unsqueeze", styles, graph.constant([1]))  # (B, 1, C)
    weight = graph("Mul", graph.constant(part.weight.flatten(1)), styles)  # (B, 3, C)
    flat = graph("Reshape", x, graph.constant([0, 0, -1]))  # (B, C, R R)
    rgb = graph("MatMul", graph.cast(weight, graph.dtype), flat)
    rgb = graph("Add", rgb, graph.constant(part.bias[:, None], graph.dtype))
    rgb = rgb if part.clamp is None else clipped(graph, rgb, part.clamp, graph.dtype)
    rgb = graph("Reshape", rgb, graph.constant([0, 3, resolution, resolution]))
    return graph.cast(rgb, torch.float32)


def upsampled(graph: Graph, image: str) -> str:
    """`generators.ops.upsample2x`: a new pixel is 3/4 of the nearest old one, 1/4 of the next."""
    phases = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])  # of one direction
    four = torch.einsum("ay,bx->abyx", phases, phases).reshape(4, 1, 3, 3).repeat(3, 1, 1, 1)
    wide = graph("Conv", image, graph.constant(four), pads=[1] * 4, group=3)  # (B, 12, R, R)
    return graph("DepthToSpace", wide, blocksize=2, mode="CRD")


def clipped(graph: Graph, x: str, most: float, dtype: torch.dtype = torch.float32) -> str:
    return graph("Clip", x, graph.constant(-most, dtype), graph.constant(most, dtype))
