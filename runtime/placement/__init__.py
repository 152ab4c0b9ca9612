"""Where a bundle runs: what its files say of it, which device may run it, and the proof that it does."""

from edgephi.runtime.placement.nodes import Kept as Kept
from edgephi.runtime.placement.nodes import Placement as Placement
from edgephi.runtime.placement.nodes import ProviderNodes as ProviderNodes
