"""What an export is asked for, and everything about it that can be refused before a source is opened.

`export/api.py` says what each option means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from edgephi.arguments import (
    require_choice,
    require_flag,
    require_integer,
    require_number,
    require_path,
    require_text,
    require_texts,
    wrong,
)
from edgephi.bundle import NpuNumerics
from edgephi.devices.hexagon import HexagonTarget, hexagon_target
from edgephi.errors import SourceError, UsageError
from edgephi.export.calibrate.budget import MIXED_BLOCKS, Budget
from edgephi.export.calibrate.sensitivity import Elsewhere
from edgephi.export.calibrate.text import require_text_file
from edgephi.export.checkpoint.source import require_revision
from edgephi.export.decide import Effort
from edgephi.export.graph.variants import require_devices
from edgephi.export.lora import LARGEST_RANK, LoraLayers
from edgephi.export.weights.recipe import Precision, Recipe, make_recipe, require_written
from edgephi.files import refuse_path
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.registry import AUTO, QUANTIZERS, ROUNDING, may_need_text, needs_text, quantizer, quantizer_words

Exporter = Literal["edgephi", "optimum"]
ExportPhase = Literal["exporting", "compiling"]
KvCache = Literal["auto", "int8", "float"]
"""Type of keys and values in the CPU's graph that edgephi runs; auto measures what int8 would change."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""MatMulNBits has no others."""
LARGEST_NPU_BLOCK = 128
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """What a caller is told while an export runs, in bytes of the source."""

    done: int
    total: int
    phase: ExportPhase = "exporting"
    """compiling: for an NPU, which takes most of the time."""
    method: str = ""
    """What becomes of the weights; empty where they are only rounded or kept."""
    expected_seconds: float | None = None
    """What that will take on this machine, said before it begins; None: it is not known, or not worth saying."""


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of `edgephi.export_model`; the properties hold for options that `validate` returned."""

    source: str | Path
    output: str | Path
    precision: Precision = "int4"
    block_size: int = 32
    accuracy_level: int = 4
    quantize: str = AUTO
    effort: Effort | None = None
    bits: float | None = None
    target_size: str | int | None = None
    revision: str | None = None
    force: bool = False
    via: Exporter = "edgephi"
    calibration: str | Path | None = None
    seed: int = 0
    rotate: bool = False
    head_bits: int = 8
    kv_cache: KvCache = "auto"
    lora: int | None = None
    lora_layers: LoraLayers = "all"
    devices: Sequence[str] = ("cpu",)
    npu_numerics: NpuNumerics | None = None
    npu_share_weights: bool = False
    on_progress: Callable[[Progress], None] | None = None
    measure_elsewhere: Elsewhere | None = None

    def validate(self) -> ExportOptions:
        """The same options with numbers of Python's own; nothing of the source is read.

        Raises:
            UsageError: an option has another type than its field, a value that does not exist, or contradicts another.
            SourceError: a path that no system has, or a calibration text that is not there.
            DeviceError: a profile that describes no NPU.
        """
        options = self._with_checked_types()
        options._require_values()
        options._require_agreement()
        if (target := options.npu_target) is not None:
            options._require_compiled(target)
        elif options.npu_numerics is not None or options.npu_share_weights:
            asked = options.npu_numerics or "sharing weights between prompt and token graphs"
            raise UsageError(f"{asked} is for an NPU", remedy="Add --device snapdragon-x-elite, or leave it out")
        else:
            require_devices(options.devices)
        if options.via == "optimum":
            options._require_traced()
        if options.calibration_file is not None:
            rounded = options.precision != "int4" or not may_need_text(options.quantize)
            if target is None and options.budget is None and rounded:
                raise unused_text()
            require_text_file(options.calibration_file)
        require_revision(options.source, options.revision)
        return options

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def calibration_file(self) -> Path | None:
        return None if self.calibration is None else Path(self.calibration)

    @property
    def recipe(self) -> Recipe:
        """How the CPU's graph stores weights, before `auto` is settled."""
        rotation_seed = self.seed if self.rotate else None
        return make_recipe(
            self.precision, self.block_size, self.accuracy_level, self.quantize, rotation_seed, self.head_bits
        )

    @property
    def budget(self) -> Budget | None:
        if self.bits is None and self.target_size is None:
            return None
        return Budget(self.bits, None if self.target_size is None else parse_size(self.target_size))

    @cached_property
    def npu_target(self) -> HexagonTarget | None:
        """The chip whose NPU the layers are compiled for, read once: a profile may be a file of the user's."""
        return hexagon_target(self.devices)

    def _with_checked_types(self) -> ExportOptions:
        require_path("source", self.source, "the path of a checkpoint, ollama:NAME, or a hub id, as a text")
        require_path("output", self.output)
        if self.revision is not None:
            require_text("revision", self.revision, "a branch, tag or commit, as a text")
        if self.calibration is not None:
            require_path("calibration", self.calibration)
        require_texts("devices", self.devices, "a list of names, such as ['cpu', 'webgpu']")
        if self.on_progress is not None and not callable(self.on_progress):
            raise wrong("on_progress", self.on_progress, "a function that takes a Progress")
        if self.measure_elsewhere is not None and not callable(self.measure_elsewhere):
            raise wrong("measure_elsewhere", self.measure_elsewhere, "a function of names and tokens")
        require_choice("precision", self.precision, get_args(Precision))
        require_choice("quantize", self.quantize, quantizer_words())
        if self.effort is not None:
            require_choice("effort", self.effort, get_args(Effort))
        require_choice("via", self.via, get_args(Exporter))
        require_choice("kv_cache", self.kv_cache, get_args(KvCache))
        require_choice("lora_layers", self.lora_layers, get_args(LoraLayers))
        if self.npu_numerics is not None:
            require_choice("npu_numerics", self.npu_numerics, get_args(NpuNumerics))
        for name in ("force", "rotate", "npu_share_weights"):
            require_flag(name, getattr(self, name))
        size = self.target_size
        return replace(
            self,
            bits=None if self.bits is None else require_number("bits", self.bits),
            target_size=size if size is None or isinstance(size, str) else require_integer("target_size", size),
            block_size=require_integer("block_size", self.block_size),
            head_bits=require_integer("head_bits", self.head_bits),
            lora=None if self.lora is None else require_integer("lora", self.lora),
            accuracy_level=require_integer("accuracy_level", self.accuracy_level),
            seed=require_integer("seed", self.seed),
        )

    def _require_values(self) -> None:
        """Each option by itself."""
        refuse_path(SourceError, self.source, self.calibration)
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}", remedy="Choose 0 or more")
        if not 0 <= self.accuracy_level <= 4:
            raise UsageError(f"the accuracy level is {self.accuracy_level}", remedy="Choose 0 to 4; 4 is fast")
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block size {self.block_size} does not exist", remedy="Choose 16, 32, 64, 128 or 256")
        if self.head_bits not in (4, 8):
            raise UsageError(f"a head of {self.head_bits} bits does not exist", remedy="Choose 4 or 8")
        if self.lora is not None and not 1 <= self.lora <= LARGEST_RANK:
            raise UsageError(f"LoRA of rank {self.lora} is not built", remedy=f"Choose 1 to {LARGEST_RANK}")
        if self.bits is not None and not 0 < self.bits <= 32:
            remedy = "Choose between 4 and 9, such as --bits 4.5"
            raise UsageError(f"{self.bits:g} bits a weight make no sense", remedy=remedy)
        if self.target_size is not None:
            parse_size(self.target_size)

    def _require_agreement(self) -> None:
        """Options that every exporter has, with each other."""
        if self.quantize not in (AUTO, ROUNDING) and self.precision != "int4":
            raise UsageError(
                f"{quantizer(self.quantize).title} makes int4 bundles", remedy="Leave --quantize out, or --precision"
            )
        if self.quantize != AUTO and self.precision == "int4":
            require_written(self.quantize, BlockFormat(4, self.block_size, symmetric=False))
        if self.head_bits == 4 and self.precision != "int4":
            raise UsageError("a head in 4 bits is for int4 bundles", remedy="Leave --head-bits out, or --precision")
        if self.bits is not None and self.target_size is not None:
            raise UsageError("bits and a target size are two budgets", remedy="Give one of --bits and --target-size")
        if self.effort is not None and (self.quantize != AUTO or self.precision != "int4"):
            raise UsageError(
                "an effort says how long auto may take for int4 weights",
                remedy="Leave --effort out, or --quantize and --precision",
            )
        self._require_lora()
        if self.measure_elsewhere is not None and self.budget is None:
            raise UsageError(
                "without a budget no weight is measured, here or elsewhere", remedy="Give --bits or --target-size"
            )
        if self.budget is not None and self.precision != "int4":
            raise UsageError("a budget chooses bits itself", remedy="Leave --precision out")
        if self.budget is not None and self.block_size not in MIXED_BLOCKS:
            raise UsageError(
                f"a budget mixes blocks of {', '.join(map(str, MIXED_BLOCKS))}, and --block-size is the smallest",
                remedy="Choose one of these, or leave --block-size out",
            )

    def _require_lora(self) -> None:
        if self.lora is None:
            if self.lora_layers != "all":
                raise UsageError("--lora-layers says where LoRA goes, and there is none", remedy="Add --lora RANK")
            return
        if self.via != "edgephi":
            raise UsageError("optimum's graph takes no LoRA", remedy="Leave --lora out, or --via")
        if self.rotate:
            raise UsageError(
                "an adapter is trained for weights that are not rotated", remedy="Leave --lora out, or --rotate"
            )
        if self.kv_cache == "int8":
            raise UsageError(
                "the scales of an int8 KV cache are fitted to the model, and an adapter changes its keys and values",
                remedy="Leave --lora out, or --kv-cache",
            )

    def _require_compiled(self, target: HexagonTarget) -> None:
        """Options that graphs compiled for an NPU have."""
        self._require_float_cache("the NPU's")
        if self.lora is not None:
            raise UsageError("the NPU's graphs take no LoRA", remedy="Leave --lora out, or the NPU out of --device")
        if self.via != "edgephi" or self.budget is not None or self.head_bits != 8:
            raise UsageError(
                "the NPU's graphs have one size of block and a head in 8 bits, and are edgephi's own",
                remedy="Leave --bits, --target-size, --head-bits and --via out",
            )
        if self.precision != "int4":
            raise UsageError("graphs for the NPU have int4 weights", remedy="Leave --precision out")
        if self.quantize != AUTO and quantizer(self.quantize).needs_importance:
            raise UsageError(
                f"the NPU's weights are not {quantizer(self.quantize).title}",
                remedy="Choose --quantize gptq or rtn, or leave it out",
            )
        if self.block_size > LARGEST_NPU_BLOCK:
            raise UsageError("the NPU takes blocks of up to 128", remedy="Choose --block-size 16, 32, 64 or 128")
        if target.tokens_on == "cpu" and self.npu_share_weights:
            raise UsageError(
                f"{target.name} computes tokens on the CPU: the NPU has no graph to share weights with",
                remedy="Leave --npu-share-weights out, or name a profile whose decode begins with qnn",
            )
        if target.tokens_on == "cpu" and self.npu_numerics == "w4a16":
            raise UsageError(
                f"{target.name} computes tokens on the CPU, which has no graph of w4a16",
                remedy="Leave --npu-numerics out, or name a profile whose decode begins with qnn",
            )

    def _require_float_cache(self, whose: str) -> None:
        if self.kv_cache == "int8":
            raise UsageError(
                f"--kv-cache int8 is for the CPU's graph that edgephi builds, not for {whose}",
                remedy="Leave --kv-cache out",
            )

    def _require_traced(self) -> None:
        """Options that graphs traced by optimum have."""
        self._require_float_cache("optimum's")
        plain = self.budget is None and self.calibration is None and self.head_bits == 8 and not self.rotate
        plain = plain and self.effort is None
        if set(self.devices) != {"cpu"} or self.quantize not in (AUTO, ROUNDING) or not plain:
            raise UsageError(
                "optimum's graph is for the CPU, and its weights are only rounded",
                remedy="Leave --device, --rotate, --bits, --target-size, --head-bits, --calibration, --effort and "
                "--quantize out, or --via",
            )
        if self.precision == "fp16":
            raise UsageError("a traced graph computes in float32", remedy="Choose --precision int4, int8 or fp32")


def parse_size(text: str | int) -> int:
    """Bytes of "105MB", "2.2 GB", "100MiB" or a plain number; kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UsageError(f"{text!r} is no size", remedy="Write it like 105MB, 2.2GB or 100MiB")
    return int(float(match[1]) * unit)


def unused_text() -> UsageError:
    """The error for a calibration text that nothing would read."""
    names = [name for name in QUANTIZERS if needs_text(name)]
    return UsageError(
        f"only {', '.join(quantizer(name).title for name in names)} and a budget need a calibration text",
        remedy=f"Add --quantize {' or '.join(names)}, --bits or --target-size, or leave the text out",
    )
