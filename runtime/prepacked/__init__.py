"""Weights as this processor's kernels read them, kept in the user's cache."""
