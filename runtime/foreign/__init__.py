"""Folders for onnxruntime-genai that somebody else made: what is wrong with them, and a copy without it."""
