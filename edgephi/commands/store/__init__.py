"""Verbs of the store: pull, list, rm and cache."""
