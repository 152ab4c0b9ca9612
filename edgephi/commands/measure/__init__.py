"""Verbs that measure: bench, evaluate and ai-hub."""
