"""The static network by TensorRT, through torch_tensorrt where that is installed, or by ONNX.

Not run by this project yet: no machine that it measured had either package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from runtimes import Unavailable, require
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]


def tensorrt_network(network: nn.Module, example: Tensor) -> Network:
    """Builds an engine for batches like one example, in its precision.

    Args:
        network: On the GPU.
        example: [N, C, H, W] there; the engine takes this shape alone.

    Returns:
        The engine as a function.

    Raises:
        Unavailable: If neither torch_tensorrt nor tensorrt is installed.
    """
    try:
        wrapper = require("torch_tensorrt")
    except Unavailable:
        return _by_onnx(require("tensorrt"), network, example)
    return wrapper.compile(
        network, ir="dynamo", inputs=[example], enabled_precisions={example.dtype}
    )


def _by_onnx(trt: Any, network: nn.Module, example: Tensor) -> Network:
    """The same by the exporter of PyTorch and TensorRT's own parser."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # precisions are those of the exported tensors
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(typed)
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(_exported(network, example)):
        raise RuntimeError(f"TensorRT cannot read the network: {parser.get_error(0)}")
    plan = builder.build_serialized_network(definition, builder.create_builder_config())
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    source, target = (engine.get_tensor_name(index) for index in range(2))
    output = example.new_empty(tuple(engine.get_tensor_shape(target)))

    def run(images: Tensor) -> Tensor:
        images = images.contiguous()
        context.set_tensor_address(source, images.data_ptr())
        context.set_tensor_address(target, output.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return output

    # an engine is no longer valid without its runtime
    run.runtime = runtime  # type: ignore[attr-defined]
    return run


def _exported(network: nn.Module, example: Tensor) -> bytes:
    """Returns the network as ONNX."""
    require("onnx"), require("onnxscript")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            network, (example.contiguous(),), path, dynamo=True, verbose=False, external_data=False
        )
        return path.read_bytes()
