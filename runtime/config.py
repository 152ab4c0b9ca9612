"""What the runtime needs from a bundle's genai_config.json, checked before onnxruntime-genai sees the file."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgephi.bundle import GENAI_CONFIG, GraphEntry, Manifest, NpuFacts
from edgephi.errors import BundleError
from edgephi.records import first_problem

CONFIG_LIMIT = 4 * 2**20

# onnxruntime-genai loads a shared library that either of these names. A bundle has no business bringing code.
CODE_KEYS = frozenset({"custom_ops_library", "library_path"})


def answering(graph: GraphEntry) -> str:
    """The file that answers: logits of a prompt's other tokens are for those who measure, or verify drafts."""
    return graph.last_row or graph.file


class _Decoder(BaseModel):
    model_config = ConfigDict(frozen=True)
    filename: str | None = Field(default=None, description="None: a pipeline of several graphs")


class GenaiModel(BaseModel):
    """The `model` section; keys only onnxruntime-genai needs are left to it."""

    model_config = ConfigDict(frozen=True)
    context_length: int = Field(gt=0, description="tokens of prompt and answer together")
    vocab_size: int = Field(gt=0)
    eos_token_id: int | tuple[int, ...]
    decoder: _Decoder

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset((self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id)


class _GenaiConfig(BaseModel):
    model_config = ConfigDict(frozen=True)
    model: GenaiModel


def read_genai_config(folder: Path, manifest: Manifest) -> GenaiModel:
    """Read genai_config.json.

    Raises:
        BundleError: missing, malformed, at odds with the manifest, or naming a library to load.
    """
    refuse_npu_bundle(folder, manifest)
    model = _read(folder)
    if model.decoder.filename not in {graph.file for graph in manifest.graphs}:
        raise BundleError(
            f"the configuration names a graph the manifest does not: {model.decoder.filename!r}",
            where=folder / GENAI_CONFIG,
            remedy="Export the model again",
        )
    return model


def read_npu_config(folder: Path, facts: NpuFacts) -> GenaiModel:
    """Read genai_config.json of a bundle for an NPU, whose graphs are in the manifest; the context is that of these.

    Raises:
        BundleError: missing, malformed, or naming a library to load.
    """
    return _read(folder).model_copy(update={"context_length": facts.context_length})


def _read(folder: Path) -> GenaiModel:
    path = folder / GENAI_CONFIG

    def refusal(what: str) -> BundleError:
        return BundleError(what, where=path, remedy="Export the model again")

    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise refusal("the configuration is implausibly large")
        text = path.read_bytes()
        parsed = _GenaiConfig.model_validate_json(text)
        keys = _keys(json.loads(text))
    except OSError as error:
        raise refusal(f"the configuration cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise refusal(f"the configuration cannot be used: {first_problem(error)}") from error
    if named := sorted(keys & CODE_KEYS):
        raise refusal(f"the configuration asks to load code: {named[0]}")
    return parsed.model


def refuse_npu_bundle(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError for a bundle that only `runtime/npu.py` opens: the CPU has no graph of its layers."""
    if manifest.npu is not None:
        raise BundleError(
            f"the bundle's layers are compiled for the NPU of {manifest.npu.target}, and no NPU was asked for",
            where=folder,
            remedy="Export the model again without --device, for the CPU",
        )


def _keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    if isinstance(value, list):
        return set[str]().union(*map(_keys, value))
    return set()
