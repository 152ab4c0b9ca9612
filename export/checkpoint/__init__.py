"""What lies on disk: folders, GGUF files, Ollama's models, hub ids; described, and read in slices."""
