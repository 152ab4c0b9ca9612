"""The report of `gpu_check`: what two answers have in common, rates, and Markdown. Its schema is in that module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from edgephi.benchmarks.report import in_one_line, markdown_table
from edgephi.devices.providers import provider


def compare(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a comparison that two answers (`gpu_children.answer`) decide."""
    mine, other = np.asarray(gpu["first_logits"]), np.asarray(cpu["first_logits"])
    spread = float(other.std())
    pairs = list(zip(cpu["tokens"], gpu["tokens"], strict=True))
    equal = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    placed = gpu["place"]["placement"]
    return {
        "tokens": len(pairs),
        "equal_tokens": equal,
        "margin": None if equal == len(pairs) else cpu["margins"][equal] / spread,
        "difference": float(np.abs(mine - other).max()) / spread,
        "nodes": {part["provider"]: part["nodes"] for part in placed["providers"]},
        "left_to_cpu": {one["op_type"]: one["nodes"] for one in placed["kept"]},
        "gpu_weight_bytes": sum(part["weight_bytes"] for part in placed["providers"] if "CPU" not in part["provider"]),
    }


def rates(seconds: Mapping[str, Sequence[float]], *, of_prompt: bool) -> dict[str, list[float]]:
    """Seconds a prompt (by its length) or a token become tokens per second."""
    return {length: [(int(length) if of_prompt else 1) / one for one in times] for length, times in seconds.items()}


def disagreements(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Comparisons in float32 whose logits differ by more than a hundredth of their spread, or whose tokens differ where
    the CPU's choice was clear."""
    found = []
    for one in comparisons:
        unclear = one["margin"] is None or one["margin"] < 4 * one["difference"]
        if one["recipe"] == "exact" and (one["difference"] > 0.01 or not unclear):
            found.append(
                f"{one['model']}: the GPU's logits differ by {one['difference']:.1e} of their spread, and "
                f"{one['equal_tokens']} of {one['tokens']} tokens are the CPU's"
            )
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = ["# WebGPU on this machine", ""]
    names = [f"{one['name']} ({one['driver']} {one['driver_version']})" for one in report["vulkan"]]
    lines += [f"- Vulkan lists: {', '.join(names) or 'nothing'}"]
    gpus = [one for one in report["devices"] if one["provider"] == provider("webgpu").name]
    lines += [
        f"- edgephi lists: {one['kind']}, vendor 0x{one['vendor_id']:04x} {one['vendor']}".rstrip()
        + f", device 0x{one['device_id']:04x}"
        for one in gpus
    ]
    if report["software"]:
        lines += ["- **A software driver computed. Nothing here is the speed of a GPU.**"]
    lines += [f"- {in_one_line(report['machine'])}", f"- {in_one_line(report['wheels'])}", ""]
    rows: list[tuple[str, ...]] = [
        (
            one["model"],
            one["recipe"],
            f"{one['equal_tokens']} of {one['tokens']}",
            "–" if one["margin"] is None else f"{one['margin']:.1e}",
            f"{one['difference']:.1e}",
            ", ".join(str(count) for name, count in one["nodes"].items() if "CPU" not in name) or "0",
            str(sum(one["left_to_cpu"].values())),
        )
        for one in report["comparisons"]
    ]
    if rows:
        header = ("model", "recipe", "tokens as the CPU's", "margin there", "logits differ by")
        lines += [markdown_table((*header, "nodes on the GPU", "left to the CPU"), rows), ""]
    for kind, title in (("prefill", "prefill"), ("whole_prefill", "prefill in one piece"), ("decode", "decode")):
        lengths = list(dict.fromkeys(length for one in report["speed"] for length in one.get(kind, {})))
        if lengths:
            rows = [
                (f"{one['model']}, {one['place']}", *(_median(one[kind].get(length)) for length in lengths))
                for one in report["speed"]
                if one.get(kind)
            ]
            lines += [markdown_table((f"{title}, tokens/s", *(f"{length} tokens" for length in lengths)), rows), ""]
    rows = [
        (
            f"{one['model']}, {one['place']}",
            *(", ".join(f"{s:.2f}" for s in one[key]) for key in ("load_s", "first_token_s")),
        )
        for one in report["speed"]
        if one.get("load_s")
    ]
    if rows:
        lines += [markdown_table(("seconds, in order", "load", "to the first token"), rows), ""]
    for one in report["speed"]:
        for way, said in one.get("allocated", {}).items():
            lines.append(f"- {one['model']}: a buffer on the device by {way}: {said}")
        for length, said in one.get("whole_refused", {}).items():
            lines.append(f"- {one['model']}: plain onnxruntime does not take {length} tokens in one piece: {said}")
        if "same_tokens" in one:
            lines.append(f"- {one['model']}: the plain loop's tokens are edgephi's: {one['same_tokens']}")
    lines += [f"- {note}" for note in report.get("notes", ())]
    lines += [f"- failed: {said}" for said in report["failures"]]
    return "\n".join(lines).rstrip() + "\n"


def _median(values: Sequence[float] | None) -> str:
    return "–" if not values else f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"
