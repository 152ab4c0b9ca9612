"""A DecoderSpec becomes ONNX graphs: one file for each part of a decoder."""
