"""Verbs that make a bundle, look at it, check it and ship it: export, adapter, inspect, verify and package."""
