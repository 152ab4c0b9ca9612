"""Whether the WebGPU graphs run on this machine's GPU as they do on the CPU, and how fast.

    pip install -e ".[webgpu]"
    python -m edgephi.benchmarks.studies.gpu_check --folder /disk/with/space --output gpu

It needs a GPU with a Vulkan, Direct3D 12 or Metal driver, and on Linux the Vulkan loader (Debian: libvulkan1). A
software driver is used only with --software, and the report then says so. The wheels that count are onnxruntime,
onnxruntime-genai and onnxruntime-ep-webgpu, in the versions that edgephi's pyproject.toml names.

Models have published shapes and random weights, which are written and exported here; nothing is fetched. Families are
cut to a few layers and a small vocabulary, and compared with the CPU; `--model` (whole, unless `--layers` cuts it) is
compared and timed. Bundles that are named on the command line take the place of both. `--tiny` shrinks all shapes, for
software drivers.

The report, gpu_check.json in --output (and the same as Markdown, gpu_check.md), written after every step:

- `machine`, `wheels`: processor, cores, memory, system, versions; `command`: its arguments; `notes`: what a person
  added to a report that is kept.
- `software`: whether a software driver computed; `devices`: what edgephi's detection lists (provider, kind, vendor,
  vendor_id, device_id, metadata); `vulkan`: names and drivers that Vulkan itself lists.
- `comparisons`: by model and `recipe` (`exact`: float32 on both; `fast`: int8 activations on the CPU, float16 on the
  GPU; `as stored`): `kind` of device, `prompt` and `tokens` (how many), `equal_tokens` (how many of the greedy tokens
  are the CPU's, up to the first that differs), `margin` (where one differs, the CPU's best logit less its second, over
  the spread), `difference` (largest difference of the logits of the first new token, over the spread, which is the
  standard deviation of the CPU's logits), `nodes` by provider, `left_to_cpu` by operator, `gpu_weight_bytes`.
- `speed`: by model and `place` (`gpu`, `cpu`: edgephi and onnxruntime-genai; `plain`: onnxruntime's Python API with the
  KV cache on the GPU, and logits for every token of a prompt): `load_s` and `first_token_s` (new processes, in order,
  the proof of the placement included), `prefill` and `whole_prefill` (tokens/s by length of the prompt), `decode`
  (tokens/s by tokens before), each a list of rounds; `threads`; for `plain`, `allocated` by way of making a buffer,
  `whole_refused` by length, and `same_tokens`: whether it decoded what edgephi's loop did there.
- `failures`: what did not run, with the sentence, and comparisons that should agree and do not. Exit status 1 if there
  is any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgephi.benchmarks import arguments
from edgephi.benchmarks.report import circumstances, run, write_json
from edgephi.benchmarks.studies.gpu_report import compare, disagreements, markdown, rates
from edgephi.benchmarks.studies.large_export import write_checkpoint
from edgephi.benchmarks.studies.vulkan_devices import vulkan_devices
from edgephi.bundle import read_manifest
from edgephi.child import call
from edgephi.devices.detect import survey
from edgephi.devices.doctor import relevant_wheels
from edgephi.devices.providers import SOFTWARE_GPU, provider
from edgephi.errors import DeviceError, EdgephiError, UsageError
from edgephi.export.families.published import PUBLISHED
from edgephi.runtime.engines.genai import PREFILL_CHUNK

FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "Phi-3-mini": ("microsoft/Phi-3-mini-4k-instruct", {}),
    "Phi-3-mini, short window": ("microsoft/Phi-3-mini-4k-instruct", {"sliding_window": 24}),
    "Phi-4-mini": ("microsoft/Phi-4-mini-instruct", {}),
    "Phi-4-mini, long rope": ("microsoft/Phi-4-mini-instruct", {"original_max_position_embeddings": 32}),
    "phi-2": ("microsoft/phi-2", {}),
    "SmolLM2": ("HuggingFaceTB/SmolLM2-135M-Instruct", {}),
}
CUT: Mapping[str, object] = {"num_hidden_layers": 4, "vocab_size": 4096}
TINY: Mapping[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
PROMPT, TOKENS = 64, 32
CHILDREN = "edgephi.benchmarks.studies.gpu_children"
TIMEOUT_S = 900.0
RECIPES = {"exact": 1, "fast": 4}
"""Accuracy levels; the first makes the WebGPU graph compute in float32."""


@dataclass
class Report:
    """What was found so far, written after every step, so that a run that is cut short keeps it."""

    folder: Path
    facts: dict[str, Any]
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error inside is a failure in the report, and the next figure is tried."""
        print(what, file=sys.stderr, flush=True)
        try:
            yield
        except EdgephiError as error:
            self.failures.append(f"{what}: {error}")
        self.write()

    def write(self) -> dict[str, Any]:
        """Both files; returns the document.

        Raises:
            OutputError: they cannot be written.
        """
        document = {
            **self.facts,
            "software": any(one["kind"] == "gpu-software" for one in self.comparisons),
            "comparisons": self.comparisons,
            "speed": self.speed,
            "failures": self.failures + disagreements(self.comparisons),
        }
        write_json(self.folder / "gpu_check.json", document)
        (self.folder / "gpu_check.md").write_text(markdown(document), encoding="utf-8", newline="\n")
        return document


def shape(name: str, changes: Mapping[str, object], *, tiny: bool) -> dict[str, object]:
    """config.json of a published model with these changes; `tiny`: with small sizes, but of the same kind."""
    config = {**PUBLISHED[name]}
    if tiny:
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        config |= TINY
        if kv_heads is not None:
            config["num_key_value_heads"] = 4 if kv_heads == heads else 2
        if "partial_rotary_factor" in config:
            config["partial_rotary_factor"] = 0.5
        if config.get("rope_scaling"):
            config["rope_scaling"] = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
    return {**config, **changes}


def compare_bundle(model: str, recipe: str, bundle: Path, device: str) -> dict[str, Any]:
    """One comparison.

    Raises:
        DeviceError: the bundle cannot be run on one of the two.
    """
    facts = {"folder": str(bundle), "prompt": PROMPT, "tokens": TOKENS}
    cpu, gpu = (_call("answer", {**facts, "device": where}, bundle) for where in ("cpu", device))
    return {"model": model, "recipe": recipe, "prompt": PROMPT, "kind": gpu["place"]["kind"], **compare(cpu, gpu)}


def time_by_edgephi(
    model: str, bundle: Path, place: str, device: str, lengths: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speeds on one device, and the tokens that were decoded by depth.

    Raises:
        DeviceError: the bundle cannot be run there.
    """
    facts = {"folder": str(bundle), "device": device}
    probe = "edgephi.benchmarks.bench.load_probe:timed"
    loads: list[Any] = [call(probe, facts, timeout_s=TIMEOUT_S, where=bundle) for _ in range(2)]
    found = _call("speed", {**facts, **lengths}, bundle)
    row = {
        "model": model,
        "place": place,
        "threads": found["place"]["threads"],
        "load_s": [one["load_s"] for one in loads],
        "first_token_s": [one["first_token_s"] for one in loads],
        "prefill": rates(found["prefill_s"], of_prompt=True),
        "decode": rates(found["decode_s"], of_prompt=False),
    }
    return row, found["decoded"]


def time_plainly(
    model: str, bundle: Path, decoded: Mapping[str, Any] | None, lengths: Mapping[str, object], *, software: bool
) -> dict[str, Any]:
    """Speeds of plain onnxruntime on the GPU; `decoded` are the tokens of edgephi's loop.

    Raises:
        DeviceError: the graph cannot be run there.
    """
    graph = read_manifest(bundle).graph_for("webgpu")
    if graph is None:
        raise UsageError(
            "the bundle has no graph for webgpu", where=bundle, remedy="Export it with --device cpu,webgpu"
        )
    kinds = ["gpu", "gpu-software"] if software else ["gpu"]
    facts = {"graph": str(bundle / graph.file), "kinds": kinds, "chunk": PREFILL_CHUNK, **lengths}
    found = _call("plain_loop", facts, bundle)
    row = {"model": model, "place": "plain", "allocated": found["allocated"]}
    if "used" not in found:
        return row
    return row | {
        "used": found["used"],
        "prefill": rates(found["prefill_s"], of_prompt=True),
        "whole_prefill": rates(found["whole_prefill_s"], of_prompt=True),
        "whole_refused": found["whole_refused"],
        "decode": rates(found["decode_s"], of_prompt=False),
        "same_tokens": None if decoded is None else found["decoded"] == decoded,
    }


def _call(function: str, facts: Mapping[str, object], bundle: Path) -> dict[str, Any]:
    answer: Any = call(f"{CHILDREN}:{function}", facts, timeout_s=TIMEOUT_S, where=bundle)
    return dict(answer)


def export(config: Mapping[str, object], folder: Path, level: int, block_size: int) -> Path:
    """A bundle with random weights, in the place of the one before.

    Raises:
        EdgephiError: see `edgephi.export`.
    """
    from edgephi.export.api import export_model

    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    for path in (checkpoint, bundle):
        shutil.rmtree(path, ignore_errors=True)
    checkpoint.mkdir()
    write_checkpoint(config, checkpoint)
    devices = ["cpu", "webgpu"]
    # an int8 cache, which the CPU alone can have, would be a second difference
    export_model(
        checkpoint,
        bundle,
        quantize="rtn",
        block_size=block_size,
        accuracy_level=level,
        devices=devices,
        kv_cache="float",
    )
    shutil.rmtree(checkpoint)
    return bundle


def find_gpu(*, software: bool) -> list[dict[str, Any]]:
    """What detection lists.

    Raises:
        DeviceError: there is no GPU, with the reason.
    """
    machine = survey(["webgpu"])
    listed = [device for device in machine.devices if device.provider == provider("webgpu").name]
    if any(device.is_hardware or software for device in listed):
        return [device.as_json() for device in machine.devices]
    for missing in machine.missing:
        raise DeviceError(missing.reason, remedy=missing.remedy, step=missing.step)
    raise DeviceError(
        "WebGPU lists no GPU here, only a software driver",
        remedy="Install the GPU's driver, or pass --software to check the graphs without one",
        step="device",
    )


def check(given: argparse.Namespace, folder: Path, report: Report) -> None:
    """Compare and time what the command line asks for."""
    device = "webgpu-gpu" if given.software else "gpu"

    def both(title: str, recipe: str, bundle: Path, *, timed: bool) -> None:
        with report.attempt(f"{title}, {recipe}: comparison"):
            report.comparisons.append(compare_bundle(title, recipe, bundle, device))
        if timed:
            time_all(title, bundle)

    def time_all(title: str, bundle: Path) -> None:
        lengths = {"prompts": given.prefill, "depths": given.decode, "tokens": given.tokens, "rounds": given.rounds}
        decoded = None
        with report.attempt(f"{title}: speed on the GPU"):
            row, decoded = time_by_edgephi(title, bundle, "gpu", device, lengths)
            report.speed.append(row)
        with report.attempt(f"{title}: speed of plain onnxruntime on the GPU"):
            report.speed.append(time_plainly(title, bundle, decoded, lengths, software=given.software))
        with report.attempt(f"{title}: speed on the CPU"):
            report.speed.append(time_by_edgephi(title, bundle, "cpu", "cpu", lengths)[0])

    for bundle in given.bundles:
        both(bundle.name, "as stored", bundle, timed=True)
    if given.bundles:
        return
    for family, (name, changes) in FAMILIES.items():
        for recipe, level in RECIPES.items():
            with report.attempt(f"{family}, {recipe}: export"):
                config = shape(name, {**({} if given.tiny else CUT), **changes}, tiny=given.tiny)
                both(family, recipe, export(config, folder, level, given.block_size), timed=False)
    layers = {} if given.layers is None else {"num_hidden_layers": given.layers}
    config = shape(given.model, layers, tiny=given.tiny)
    title = f"{given.model}, {config['num_hidden_layers']} layers" + (", tiny" if given.tiny else "")
    for recipe, level in RECIPES.items():
        with report.attempt(f"{title}, {recipe}: export"):
            bundle = export(config, folder, level, given.block_size)
            both(title, recipe, bundle, timed=recipe == "fast")


def main() -> None:
    """Parse the command line, check, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundles", nargs="*", type=arguments.bundle, metavar="DIR", help="bundles with a graph for webgpu"
    )
    parser.add_argument(
        "--folder", type=arguments.folder, help="where checkpoints and bundles are written, and removed"
    )
    parser.add_argument(
        "--output", type=arguments.new_folder, required=True, metavar="DIR", help="where the report is written"
    )
    parser.add_argument("--model", default="microsoft/Phi-4-mini-instruct", choices=PUBLISHED, metavar="NAME")
    parser.add_argument("--layers", type=int, metavar="N", help="of --model (as published)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for software drivers")
    parser.add_argument("--software", action="store_true", help="also take a software driver")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512, 2000], metavar="N")
    parser.add_argument("--decode", type=int, nargs="+", default=[0, 512, 2000], metavar="N", help="tokens before")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to decode")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    given = parser.parse_args()
    if not given.bundles and given.folder is None:
        raise UsageError("there is nothing to check", remedy="Name bundles, or a --folder to export into")
    if given.software:
        os.environ[SOFTWARE_GPU] = "1"
    facts = {
        "machine": circumstances("onnxruntime", "onnxruntime-genai", "onnxruntime-ep-webgpu"),
        "wheels": relevant_wheels(),
        "command": sys.argv[1:],
        "devices": find_gpu(software=given.software),
        "vulkan": vulkan_devices(),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    report = Report(given.output, facts)
    with tempfile.TemporaryDirectory(dir=given.folder and given.folder.resolve()) as scratch:
        check(given, Path(scratch), report)
    document = report.write()
    print(markdown(document))
    if document["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
