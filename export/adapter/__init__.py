"""Adapters (LoRA) that PEFT saved, written for a bundle's graph."""

from edgephi.export.adapter.convert import ConvertedAdapter as ConvertedAdapter
from edgephi.export.adapter.convert import convert_adapter as convert_adapter
