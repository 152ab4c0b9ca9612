"""A float weight becomes int4 or int8 blocks, stored the way onnxruntime's MatMulNBits reads them."""

from edgephi.quantize.allocate import Choice, allocate
from edgephi.quantize.formats import BlockFormat, QuantizedWeight, dequantize, pack_nibbles, unpack_nibbles
from edgephi.quantize.gptq import gptq
from edgephi.quantize.hadamard import Orthogonal, random_rotation, rotate
from edgephi.quantize.round_to_nearest import round_to_nearest

__all__ = [
    "BlockFormat",
    "Choice",
    "Orthogonal",
    "QuantizedWeight",
    "allocate",
    "dequantize",
    "gptq",
    "pack_nibbles",
    "random_rotation",
    "rotate",
    "round_to_nearest",
    "unpack_nibbles",
]
