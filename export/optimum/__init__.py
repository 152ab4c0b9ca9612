"""Decoders outside edgephi's families, traced by optimum-onnx in a process of its own."""
