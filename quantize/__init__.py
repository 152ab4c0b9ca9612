"""A float weight becomes int4 or int8 blocks, stored the way onnxruntime's MatMulNBits reads them."""
