"""The networks as ONNX models in memory; `encoder.export` writes and compares them.

    model = encoder_model(encoder)                    # an onnx.ModelProto, by torch's exporter
    model = synthesis_model(SwappedSynthesis(face, anime, 16), "mixed")
    model = mtcnn_model(Aligner().mtcnn.pnet)

Dtypes: "fp32"; "fp16", all in half precision; "mixed", weights stored in half precision and used in
single. Inputs and outputs are always float32, batches of any size.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, S side of a crop.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generators.blocks import SwappedSynthesis
from generators.graphs import (
    IR_VERSION,
    OPSET,
    Graph,
    describe,
    halve_weights,
    onnx_packages,
    synthesis,
)

Dtype = Literal["fp32", "fp16", "mixed"]
Metadata = Mapping[str, Any] | None  # texts, or what JSON can say


def encoder_model(encoder: Any, dtype: Dtype = "fp32", metadata: Metadata = None) -> Any:
    """images (B, 3, S, S) -> ws (B, L, D), by torch's exporter. ValueError without its packages."""
    onnx_packages()
    if find_spec("onnxscript") is None:
        raise ValueError(
            "The package onnxscript is missing; pip install 'amortized-gan-inversion[onnx]' brings "
            "it."
        )

    class Cast(nn.Module):
        """Half precision inside, single outside."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = copy.deepcopy(inner).half()

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images.half())

    network = Cast(encoder) if dtype == "fp16" else encoder
    side = encoder.config.resolution
    shapes = ({0: torch.export.Dim("B", min=1, max=4096)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            (torch.zeros(2, 3, side, side),),
            input_names=["images"],
            output_names=["ws"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    for node in model.graph.node:  # the exporter's notes, a third of a small file
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    return describe(model if dtype == "fp32" else halve_weights(model), metadata)


def synthesis_model(
    network: SwappedSynthesis,
    dtype: Dtype = "fp32",
    metadata: Metadata = None,
    *,
    both: bool = True,
    swap_resolution: int | None = None,  # None: the network's own
    colours: bool = False,  # a second input, a number 0 to 1: see `generators.latents`
    styles: Sequence[str] | None = None,  # None: all of the network's
    drawing_ws: bool = False,  # one more input, (B, L, D): the codes of the drawn blocks
) -> Any:
    """ws (B, L, D) -> a picture (B, 3, R, R) of each style ("anime") and, with `both`,
    reconstruction."""
    graph = Graph(torch.float16 if dtype == "fp16" else torch.float32)
    side = network.resolutions[-1]
    first: Any = network.face.get_submodule("b4")
    width = first.conv1.affine.weight.shape[1]
    shape = ("B", network.face.num_ws, width)
    ws = graph.input("ws", shape)
    share = graph.input("colours", ()) if colours else ""
    drawn = graph.input("drawing_ws", shape) if drawing_ws else ""
    pictures = synthesis(graph, network, ws, both, share, swap_resolution, styles, drawn)
    for name, picture in pictures.items():
        graph.output(name, picture, ("B", 3, side, side))
    model = graph.model("synthesis", metadata)
    return model if dtype == "fp32" else halve_weights(model)


def translator_model(encoder: Any, drawing: Any, metadata: Metadata = None) -> Any:
    """images (B, 3, S, S) -> what a synthesis draws, of the models of an encoder and of that."""
    onnx = onnx_packages()
    names = [value.name for value in drawing.graph.output]
    merged = onnx.compose.merge_models(encoder, drawing, io_map=[("ws", "ws")], outputs=names)
    return describe(merged, metadata)


def mtcnn_model(net: nn.Module, metadata: Metadata = None) -> Any:
    """One of facenet-pytorch's PNet, RNet, ONet: (N, 3, H, W) -> what it returns, by name."""
    graph = Graph()
    layers = dict(net.named_children())  # in the order of its forward
    flat = "dense4" in layers or "dense5" in layers
    side = {True: 48 if "dense6_1" in layers else 24, False: 0}[flat]
    x = graph.input("pictures", ("N", 3, side or "H", side or "W"))
    rank_2 = False
    heads: dict[str, str] = {}
    for name, module in layers.items():
        if isinstance(module, nn.Linear) and not rank_2:
            x, rank_2 = graph("Flatten", graph("Transpose", x, perm=[0, 3, 2, 1])), True
        head, _, number = name.rpartition("_")
        y = _mtcnn_layer(graph, module, heads.get("1", x) if "softmax" in name else x, rank_2)
        if head:
            heads[number] = y
        else:
            x = y
    rest = () if rank_2 else ("h", "w")
    graph.output("edges", heads["2"], ("N", 4, *rest))
    if "3" in heads:
        graph.output("points", heads["3"], ("N", 10))
    graph.output("probabilities", heads["1"], ("N", 2, *rest))
    return graph.model(type(net).__name__, metadata)


def _mtcnn_layer(graph: Graph, module: nn.Module, x: str, rank_2: bool) -> str:
    if isinstance(module, nn.Conv2d):
        weight, bias = graph.constant(module.weight), graph.constant(module.bias)
        return graph("Conv", x, weight, bias)
    if isinstance(module, nn.PReLU):
        slope = module.weight if rank_2 else module.weight[:, None, None]
        return graph("PRelu", x, graph.constant(slope))
    if isinstance(module, nn.MaxPool2d):
        kernel, strides = [module.kernel_size] * 2, [module.stride] * 2
        return graph("MaxPool", x, ceil_mode=1, kernel_shape=kernel, strides=strides)
    if isinstance(module, nn.Linear):
        return graph("Gemm", x, graph.constant(module.weight.T), graph.constant(module.bias))
    assert isinstance(module, nn.Softmax)
    return graph("Softmax", x, axis=1)
