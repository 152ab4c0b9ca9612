"""Who takes part: a runtime, the form of the weights it is given, and what has to be made for it first."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgephi.benchmarks.compare_runtimes.results import Peer
from edgephi.errors import UsageError
from edgephi.runtime.integers import PrefillChoice

CHILDREN = Path(__file__).parent / "children"
PEERS: tuple[Peer, ...] = ("llama.cpp", "builder", "openvino", "transformers")


class Variant(NamedTuple):
    """Arguments of edgephi's export, and what computes prompts."""

    quantize: str
    block_size: int
    head_bits: int = 8
    prefill: PrefillChoice = "blocks"


VARIANTS: Mapping[str, Variant] = {
    "auto": Variant("auto", 32),
    "auto-integers": Variant("auto", 32, prefill="integers"),
    "rtn-32": Variant("rtn", 32),
    "rtn-32-integers": Variant("rtn", 32, prefill="integers"),
    "rtn-128": Variant("rtn", 128),
    "rtn-128-integers": Variant("rtn", 128, prefill="integers"),
    "rtn-128-head4": Variant("rtn", 128, 4),
    "gptq-32": Variant("gptq", 32),
    "gptq-128": Variant("gptq", 128),
    "gptq-128-head4": Variant("gptq", 128, 4),
}
LLAMA_TYPES = ("Q4_0", "Q4_K_M")
FILE_TYPES = {2: "Q4_0", 3: "Q4_1", 15: "Q4_K_M"}
"""general.file_type of the 4-bit files that llama.cpp is also given as they are (ggml-org/llama.cpp, llama.h)."""

LAST = "prefill: head for the last token only"
EVERY = "prefill: head for every token"


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        engine: file with the contract of `children/serve.py`.
        settings: of its `open_model`.
        made: what must exist before.
        variables: of the environment, beside this process's own.
    """

    name: str
    peer: Peer
    python: Path | None
    engine: Path
    settings: Mapping[str, object]
    made: Path
    note: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of the child. The choices a user can make for edgephi by variables are not this run's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGEPHI_")}
        return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **self.variables}


def contenders(
    source: Path,
    folder: Path,
    *,
    variants: Sequence[str],
    peers: Sequence[Peer],
    pythons: Mapping[Peer, Path],
    threads: int,
    capacity: int,
    file_type: int | None,
    types: Sequence[str] = ("float32", "bfloat16"),
) -> list[Contender]:
    """Everybody who was asked for; edgephi first.

    Args:
        source: GGUF file.
        folder: where `prepare` puts what it makes.
        variants: keys of `VARIANTS`.
        pythons: interpreters; a peer without one takes part with the reason.
        capacity: tokens of the longest sequence.
        file_type: of the source, `general.file_type`.
        types: of transformers' weights.

    Raises:
        UsageError: nobody knows this variant.
    """
    found = []
    for variant in variants:
        if variant not in VARIANTS:
            raise UsageError(f"edgephi has no variant {variant!r}", remedy=f"Choose from {', '.join(VARIANTS)}")
        export = VARIANTS[variant]
        bundle = folder / f"edgephi-{variant.removesuffix('-integers')}"
        found.append(
            Contender(
                f"edgephi {variant}",
                "edgephi",
                Path(sys.executable),
                CHILDREN / "with_edgephi.py",
                {"folder": str(bundle), "threads": threads, "prefill": export.prefill},
                bundle,
                f"quantize {export.quantize}, block {export.block_size}, int{export.head_bits} head; {LAST}, "
                f"in pieces of 256, by {export.prefill}; prepacked weights, mapped",
                {"EDGEPHI_CACHE": str(folder / f"cache-{variant}")},
            )
        )
    for peer in peers:
        python = pythons.get(peer)
        if peer == "llama.cpp":
            files = {name: folder / f"{name}.gguf" for name in LLAMA_TYPES}
            if file_type in FILE_TYPES:
                files[FILE_TYPES[file_type]] = source
            for name, file in files.items():
                made = "the source itself" if file == source else "llama_model_quantize from the source"
                found.append(
                    Contender(
                        f"llama.cpp {name}",
                        peer,
                        python,
                        CHILDREN / "with_llama.py",
                        {"file": str(file), "threads": threads, "capacity": capacity},
                        file,
                        f"{made}; {LAST}; flash attention off",
                    )
                )
        elif peer == "builder":
            made_by = folder / "builder"
            note = f"-p int4 -e cpu, its defaults; plain onnxruntime-genai with threads set; {EVERY}"
            settings: dict[str, object] = {"folder": str(made_by), "threads": threads}
            found.append(Contender("og builder int4", peer, python, CHILDREN / "with_og.py", settings, made_by, note))
        elif peer == "openvino":
            read = folder / "openvino"
            note = f"its own GGUF reader, LLMPipeline (SDPA), its default precisions (u8 KV cache); {LAST}"
            settings = {"folder": str(read), "threads": threads}
            found.append(Contender("OpenVINO GenAI", peer, python, CHILDREN / "with_openvino.py", settings, read, note))
        else:
            for name in types:
                found.append(
                    Contender(
                        f"transformers {name}",
                        peer,
                        python,
                        CHILDREN / "with_transformers.py",
                        {"folder": str(folder / "hf"), "threads": threads, "type": name},
                        folder / "hf",
                        f"PyTorch, weights in {name}; {LAST}",
                    )
                )
    return found
