"""The quality of a bundle, measured: perplexity, divergence from the float model, multiple choice, plots."""
