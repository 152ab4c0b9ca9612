"""SHA-256 of every file that exports write, to compare one commit with another: a refactoring changes none of them.

    python benchmarks/studies/export_hashes.py MODEL.gguf --fixtures tests/fixtures --json before.json
    python benchmarks/studies/export_hashes.py MODEL.gguf --fixtures tests/fixtures --compare before.json

Each source is exported in every precision for every device; where edgephi refuses, its sentence stands in place of
hashes. edgephi.json is left out, because it records the commit and the time. Of edgephi the script calls nothing but
`edgephi.export`, so that it can be run on commits where everything else has another name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import edgephi
from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import run

RECIPES: dict[str, dict[str, object]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4 rtn": {"precision": "int4", "quantize": "rtn"},
}
CALIBRATED: dict[str, dict[str, object]] = {
    "int4 gptq": {"precision": "int4", "quantize": "gptq"},
    "int4 budget": {"precision": "int4", "quantize": "rtn", "bits": 7.0},
}
"""These run the graphs of single layers. They take long, and are for the fixtures only."""
DEVICES = ("cpu", "webgpu", "directml")
SPECIAL = ("<unk>", "<s>", "</s>")
Hashes = dict[str, dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=arguments.source, help="checkpoint folders or GGUF files")
    parser.add_argument(
        "--fixtures",
        type=arguments.folder,
        help="a folder whose subfolders are tiny checkpoints, with or without a tokenizer",
    )
    parser.add_argument("--json", type=arguments.new_file, help="write the hashes to this file")
    parser.add_argument(
        "--compare", type=arguments.file, help="name what differs from such a file, and exit with 1 if anything does"
    )
    given = parser.parse_args()
    found: Hashes = {}
    with tempfile.TemporaryDirectory() as temporary:
        for export, files in _exports(given.sources, given.fixtures, Path(temporary)):
            found[export] = files
            for file, digest in files.items():
                print(f"{digest}  {export}  {file}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if given.compare:
        changed = differences(json.loads(given.compare.read_text(encoding="utf-8")), found)
        print(*changed, f"{len(found)} exports, differences: {len(changed)}", sep="\n")
        sys.exit(bool(changed))


def differences(before: Hashes, after: Hashes) -> list[str]:
    """A line for every export or file that only one side has, or whose hashes differ."""
    found = []
    for export in sorted({*before, *after}):
        old, new = before.get(export, {}), after.get(export, {})
        found += [f"{export}: {file}" for file in sorted({*old, *new}) if old.get(file) != new.get(file)]
    return found


def export_hashes(source: str | Path, recipe: Mapping[str, object], device: str, folder: Path) -> dict[str, str]:
    """Names and SHA-256 of the files of one export, or `refused` and the sentence."""
    output = folder / "bundle"
    try:
        edgephi.export(source, output, devices=("cpu",) if device == "cpu" else ("cpu", device), **recipe)  # type: ignore[arg-type]
    except edgephi.EdgephiError as error:
        return {"refused": str(error).splitlines()[0].replace(str(folder), "")}
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "edgephi.json")
    found = {path.relative_to(output).as_posix(): _sha256(path) for path in files}
    shutil.rmtree(output)
    return found


def _exports(sources: list[str], fixtures: Path | None, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    pairs = [(Path(source).name, source, RECIPES) for source in sources]
    for fixture in sorted(fixtures.iterdir()) if fixtures else ():
        if (fixture / "config.json").is_file():
            pairs.append((fixture.name, str(_with_tokenizer(fixture, folder / fixture.name)), RECIPES | CALIBRATED))
    for name, source, recipes in pairs:
        for title, recipe in recipes.items():
            for device in DEVICES:
                yield f"{name}, {title}, {device}", export_hashes(source, recipe, device, folder)


def _with_tokenizer(fixture: Path, folder: Path) -> Path:
    """A copy of a checkpoint, with a tokenizer of single characters where it has none."""
    shutil.copytree(fixture, folder)
    if (folder / "tokenizer.json").is_file():
        return folder
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    vocabulary = dict(zip(SPECIAL, range(3), strict=True)) | {chr(0x4E00 + index): index for index in range(3, size)}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": index, "content": text, **flags} for index, text in enumerate(SPECIAL)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model}
    nothing = dict.fromkeys(("decoder", "normalizer", "pre_tokenizer", "post_processor"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | nothing), encoding="utf-8")
    names = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
