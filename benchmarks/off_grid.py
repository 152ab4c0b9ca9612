"""A GGUF model changed so that its weights lie on no 4-bit grid while it computes the same; written in float16.

A file in 4 bits flatters every 4-bit format: its weights already lie on a grid. Two exact changes take them off it:

- Factors: every input channel of a linear layer is multiplied by a number, and what makes the channel is divided by it.
  A format that rescales channels finds such factors again to a part.
- Orders: channels are put in another order, in what makes them and in what reads them. No rescaling undoes that; the
  blocks of the file are broken up, because a block is then made of columns of many.

Layout of the tensors: llama.cpp's llama architecture, with q, k, v, gate and up apart. Rope rotates pairs of rows of q
and k, so these stay in their order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import UnsupportedModelError

Weights = dict[str, NDArray[np.float32]]
"""By llama.cpp's names; matrices are [outputs, inputs]."""

SPREAD = 0.35
"""Standard deviation of the factors' logarithms: most lie between a half and two."""


def scale_channels(weights: Weights, layers: int, heads: int, kv_heads: int, seed: int) -> None:
    """Multiply columns by random factors, and divide by them what makes the columns: norms, rows of v, rows of up."""
    rng = np.random.default_rng(seed)

    def factors(count: int) -> NDArray[np.float32]:
        return np.exp(rng.normal(0, SPREAD, count)).astype(np.float32)

    for layer in range(layers):
        block = f"blk.{layer}."
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            gain = weights[f"{block}{norm}.weight"]
            scale = factors(gain.size)
            gain /= scale
            for reader in readers:
                weights[f"{block}{reader}.weight"] *= scale
        scale = factors(weights[block + "attn_v.weight"].shape[0])
        _rows(weights, block + "attn_v", lambda values, by=scale: (values.T * by).T)
        per_head = scale.reshape(kv_heads, -1)
        weights[block + "attn_output.weight"] /= np.repeat(per_head, heads // kv_heads, axis=0).reshape(-1)
        scale = factors(weights[block + "ffn_up.weight"].shape[0])
        _rows(weights, block + "ffn_up", lambda values, by=scale: (values.T * by).T)
        weights[block + "ffn_down.weight"] /= scale


def shuffle_channels(weights: Weights, layers: int, heads: int, kv_heads: int, seed: int) -> None:
    """Put hidden channels, the MLP's inner channels, and the value channels of each KV head in a random order."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(weights["output_norm.weight"].size)
    for name in ("token_embd", "output"):
        if f"{name}.weight" in weights:
            weights[f"{name}.weight"] = weights[f"{name}.weight"][:, hidden]
    weights["output_norm.weight"] = weights["output_norm.weight"][hidden]
    for layer in range(layers):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm", "attn_output", "ffn_down"):
            _rows(weights, block + name, lambda values: values[hidden])
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            weights[f"{block}{name}.weight"] = weights[f"{block}{name}.weight"][:, hidden]
        inner = rng.permutation(weights[block + "ffn_down.weight"].shape[1])
        for name in ("ffn_gate", "ffn_up"):
            _rows(weights, block + name, lambda values, by=inner: values[by])
        weights[block + "ffn_down.weight"] = weights[block + "ffn_down.weight"][:, inner]
        size = weights[block + "attn_v.weight"].shape[0] // kv_heads
        order = np.stack([rng.permutation(size) for _ in range(kv_heads)])
        rows = (order + size * np.arange(kv_heads)[:, None]).reshape(-1)
        _rows(weights, block + "attn_v", lambda values, by=rows: values[by])
        # query head h reads KV head h // (heads // kv_heads)
        within = np.repeat(order, heads // kv_heads, axis=0)
        columns = (within + size * np.arange(heads)[:, None]).reshape(-1)
        weights[block + "attn_output.weight"] = weights[block + "attn_output.weight"][:, columns]


def _rows(weights: Weights, name: str, change: object) -> None:
    """Change the rows of a weight and of its bias, where it has one."""
    assert callable(change)
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in weights:
            weights[f"{name}.{kind}"] = np.ascontiguousarray(change(weights[f"{name}.{kind}"]))


def write_off_grid(
    source: Path, path: Path, *, factors: int | None = None, order: int | None = None, dtype: type = np.float16
) -> None:
    """Write `path`, a GGUF file of the function of `source`.

    Args:
        source: GGUF file of the llama architecture.
        path: written through a file beside it.
        factors: seed of `scale_channels`; None: no factors.
        order: seed of `shuffle_channels`; None: the order stays.
        dtype: of matrices, float16 or float32; vectors are float32.

    Raises:
        UnsupportedModelError: another architecture.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture != "llama":
        raise UnsupportedModelError(
            f"channels of {architecture} models cannot be taken off the grid here",
            where=source,
            remedy="Name a GGUF file of the llama architecture, such as SmolLM2's",
        )
    layers, heads, kv_heads = (
        int(reader.fields[f"llama.{key}"].contents())
        for key in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    weights: Weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights[tensor.name] = np.array(values, np.float32).reshape([int(n) for n in reversed(tensor.shape)])
    if factors is not None:
        scale_channels(weights, layers, heads, kv_heads, factors)
    if order is not None:
        shuffle_channels(weights, layers, heads, kv_heads, order)
    new = path.with_name(path.name + ".new")
    writer = gguf.GGUFWriter(new, architecture)
    rewritten = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in rewritten:
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype is np.float16 else gguf.LlamaFileType.ALL_F32)
    for name, values in weights.items():
        writer.add_tensor(name, values if values.ndim == 1 else values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    new.replace(path)
