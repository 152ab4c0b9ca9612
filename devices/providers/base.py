"""What edgephi knows of an execution provider, as data: `Provider`, the graph it runs, and the devices it finds.

Each provider is one file of this folder; `edgephi.devices.providers` lists them. Everything else reads the fields below
and compares no names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgephi.devices.providers.options import Allowed

if TYPE_CHECKING:
    from onnxruntime import OrtEpDevice

Kind = Literal["cpu", "gpu", "npu", "gpu-software", "npu-simulator"]
"""What a device is. The last two run on the CPU, for tests and compiling; nothing chooses them by itself."""
HARDWARE: tuple[Kind, ...] = ("cpu", "gpu", "npu")
ANY_KIND: tuple[Kind, ...] = (*HARDWARE, "gpu-software", "npu-simulator")

DeviceClass = Literal["gpu", "npu"]
"""What `--device` takes for any device of the kind."""
PowerMode = Literal["performance", "balanced", "saver"]


@dataclass(frozen=True)
class DeviceInfo:
    """One entry of onnxruntime's device list."""

    provider: str
    kind: Kind
    vendor: str
    vendor_id: int
    """PCI vendor."""
    device_id: int
    metadata: Mapping[str, str]
    """What the hardware and the provider say about themselves; the hardware's word first."""
    raw: OrtEpDevice | None = field(repr=False, compare=False)
    """For `SessionOptions.add_provider_for_devices([raw], options)`; None: seen in another process, see `survey`."""

    @property
    def is_hardware(self) -> bool:
        """False for a simulator or a software driver."""
        return self.kind in HARDWARE

    def as_json(self) -> dict[str, Any]:
        """Plain data: the fields above without onnxruntime's object."""
        names = ("provider", "kind", "vendor", "vendor_id", "device_id")
        return {name: getattr(self, name) for name in names} | {"metadata": dict(self.metadata)}


@dataclass(frozen=True)
class GraphTraits:
    """The graph that a provider runs, over the weights every graph of a bundle shares.

    The defaults refuse what a provider was not seen to compute: a new provider says what it can.
    """

    float_type: Literal["float16"] | None = None
    """Of activations, KV cache and logits; None: as the recipe has it, which is float32 unless all is float16."""
    exact_in_float32: bool = False
    """At MatMulNBits' accuracy levels 0 and 1, which are for comparisons, float32 whatever `float_type` says."""
    opset: int | None = None
    """Version of ONNX's operators it is fastest with; None: the one of all other graphs."""
    separate_attention: bool = False
    """Its attention takes queries, keys and values apart and already rotated; see `export/graph/attention.py`."""
    row_numbers: bool = False
    """Its attention can be told each token's row in the rotary tables, by which a graph chooses between two ropes;
    otherwise the graph cuts the tables so that a token's row is its position."""
    whole_prompts: bool = False
    """It computes several tokens only behind an empty cache, and takes the cache for empty when it gets several."""
    last_row: bool = False
    """It gets a second graph, with logits of the last token only."""
    logit_rows: bool = False
    """It gets a graph in which a run says which tokens get logits; onnxruntime-genai cannot run that one."""
    float_weights: bool = False
    """It multiplies weights of 16 and 32 bits, not only blocks of 4 and 8."""
    experts: bool = False
    block_sparse: bool = False
    """Not by separate attention, whatever this says."""
    sliding_window: bool = False
    partial_blocks: bool = False
    """It multiplies matrices whose inputs are no multiple of the block size."""

    @property
    def position_ids(self) -> bool:
        """The graph has that input."""
        return self.separate_attention


@dataclass(frozen=True)
class PowerOption:
    """The option by which a provider is asked for a power mode."""

    option: str
    words: Mapping[PowerMode, str]
    applies: Callable[[Mapping[str, str]], bool] = lambda options: True
    """Whether it has a meaning beside the other options."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of onnxruntime, and what edgephi does with it."""

    name: str
    """onnxruntime's own, such as QNNExecutionProvider."""
    short: str
    """Edgephi's: in profiles, on the command line, in reports, and as the device of its graph in a bundle."""
    title: str
    """For sentences."""
    wheels: tuple[str, ...]
    """The distributions that bring it, any of them; the first is the one to install."""
    module: str | None = None
    """Imported for its `get_library_path()`; None: built into the onnxruntime of that wheel."""
    extra: str | None = None
    """The extra of edgephi that installs it."""
    requirements: Callable[[], Path] | None = None
    """The file of wheels that take the place of the core ones; without it and without `extra` it comes with these."""
    aliases: tuple[str, ...] = ()
    """Other short names that a person may have written."""
    genai_name: str | None = None
    """onnxruntime-genai's; None: it computes there without being asked, as the CPU does."""

    options: Mapping[str, Allowed] = field(default_factory=dict)
    check: Callable[[Mapping[str, str], object], None] | None = None
    """Holds options against one another; takes them and where they come from, raises DeviceError of step `options`."""
    power: PowerOption | None = None

    device_class: DeviceClass | None = None
    """None: no class chooses it, only a profile does."""
    stand_in: Literal["npu-simulator", "gpu-software"] | None = None
    """What it is when it lists the CPU: a simulator or a software driver; None: that device is the CPU."""
    profile: str | None = None
    """A profile of edgephi's own that begins with it, for sentences."""

    graph: GraphTraits | None = None
    """The graph an export writes for it; None: none."""
    compiled: bool = False
    """Its graphs are compiled for one chip, which `edgephi export --device` takes by its profile's name."""

    hardware: str = "a GPU"
    """What it needs, for sentences."""
    no_device: Callable[[], str | None] | None = None
    """A better remedy than `hardware` where it finds no device, if there is one here."""
    only_on: str | None = None
    """The one system (`sys.platform`) there are wheels for."""
    elsewhere: str = ""
    """The remedy on others."""
    check_devices: Callable[[Sequence[DeviceInfo]], None] | None = None
    """Raises DeviceError for devices that are listed and cannot work."""
    check_driver: Callable[[], None] | None = None
    """Raises DeviceError for a driver that is installed and cannot work; for `edgephi doctor`, registers nothing."""

    @property
    def runs_graphs(self) -> bool:
        """Whether edgephi makes any graph for it."""
        return self.graph is not None or self.compiled
