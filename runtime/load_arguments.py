"""The arguments of `load` that can be checked before a file is read."""

from __future__ import annotations

import os

from edgephi.arguments import require_flag, require_integer, require_path
from edgephi.errors import BundleError, UsageError
from edgephi.files import refuse_path

MOST_PARALLEL = 64


def check_load_arguments(
    folder: str | os.PathLike[str],
    device: str | os.PathLike[str],
    fallback: bool,
    verify: bool,
    threads: int | None,
    spinning: bool | None,
    max_parallel: int,
    prefix_cache_bytes: int | None,
    speculation: bool | None,
) -> None:
    """Raises UsageError for a value of another type or outside its range, BundleError for what is no path."""
    require_path("folder", folder, "the path of a bundle, as a text or a pathlib.Path")
    require_path("device", device, "'auto', 'cpu', 'gpu', 'npu', or a device profile")
    require_flag("fallback", fallback)
    require_flag("verify", verify)
    if spinning is not None:
        require_flag("spinning", spinning)
    refuse_path(BundleError, folder, device)
    if threads is not None:
        require_integer("threads", threads)
        if threads < 1:
            raise UsageError(f"threads is {threads}", remedy="Ask for at least 1 thread")
    require_integer("max_parallel", max_parallel)
    if not 1 <= max_parallel <= MOST_PARALLEL:
        raise UsageError(f"max_parallel is {max_parallel}", remedy=f"Choose from 1 to {MOST_PARALLEL}")
    if prefix_cache_bytes is not None:
        require_integer("prefix_cache_bytes", prefix_cache_bytes)
        if prefix_cache_bytes < 0:
            raise UsageError(f"prefix_cache_bytes is {prefix_cache_bytes}", remedy="Use 0 for none, or more")
    if speculation is not None:
        require_flag("speculation", speculation)
