"""Graphs of fixed shape for Snapdragon's Hexagon NPU, compiled ahead of time on any machine."""
