"""Read edgephi.json without edgephi: it is plain JSON.

python examples/read_manifest.py phi-4-mini
"""

import json
import sys
from pathlib import Path

manifest = json.loads((Path(sys.argv[1]) / "edgephi.json").read_text(encoding="utf-8"))
source, model, recipe = manifest["source"], manifest["model"], manifest["recipe"]
print(f"{model['family']}, {model['layers']} layers, context of {model['context_length']:,} tokens")
print(f"from {source['kind']} {source['name']}, {recipe['precision']}")
if recipe["quantize"]:
    print(f"quantized by {recipe['quantize']['picked']}: {recipe['quantize']['reason']}")
for graph in manifest["graphs"]:
    print(f"graph for {graph['device']}: {graph['file']}")
for file in manifest["files"]:
    print(f"{file['sha256'][:12]}  {file['bytes']:>12,}  {file['path']}")
