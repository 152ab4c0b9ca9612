"""A bundle's graphs, loaded and run: onnxruntime-genai's way, and the NPU's."""
