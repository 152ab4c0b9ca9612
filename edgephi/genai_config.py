"""genai_config.json as a bundle may have it: every key that onnxruntime-genai ("og") may be told, and nothing else.

og hands each session option it does not know to onnxruntime, and there are options that load libraries
(`custom_ops_library`, a provider's `backend_path`) and options that write files (`optimized_model_filepath`,
`enable_profiling`, `ep.context_file_path`). Whoever forbids the known ones forgets the next. So a key that is not
listed here is an error, and og is given what these models write, never the file they were read from.

Source of the keys: microsoft/onnxruntime-genai, src/config.h; they are those that `edgephi export` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from edgephi.errors import BundleError
from edgephi.files import parse_json, read_file
from edgephi.records import Finite, RelativePath, Strict, first_problem

GENAI_CONFIG = "genai_config.json"
CONFIG_LIMIT = 4 * 2**20
REMEDY = "Export the model again"
_MANY = 2**31 - 1

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,64}$")]
"""Of a graph's input or output."""
LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{0,40}%d[A-Za-z0-9_./-]{0,20}$")]
"""The same of one per layer. og formats it with snprintf: anything else behind a `%` would read its stack."""
Count = Annotated[int, Field(ge=1, le=_MANY)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
TokenId = Annotated[int, Field(ge=0, le=_MANY)]
Flag = Literal["0", "1"]


class QnnOptions(Strict):
    """What the compiled stages are run with; the options that name a library or a file are not among them."""

    backend_type: Literal["htp"]
    htp_arch: Annotated[str, Field(pattern=r"^[0-9]{1,3}$")]
    soc_model: Annotated[str, Field(pattern=r"^[0-9]{1,4}$")]
    offload_graph_io_quantization: Flag


class ProviderOptions(Strict):
    QNN: QnnOptions


class SessionOptions(Strict):
    log_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] | None = None
    provider_options: Annotated[tuple[ProviderOptions, ...], Field(max_length=1)] = ()
    intra_op_num_threads: Annotated[int, Field(ge=0, le=4096)] | None = None
    share_contexts: Flag | None = Field(default=None, alias="ep.share_ep_contexts")


class Inputs(Strict):
    input_ids: Name | None = None
    attention_mask: Name | None = None
    position_ids: Name | None = None
    past_sequence_length: Name | None = None
    total_sequence_length: Name | None = None
    past_key_names: LayerName | None = None
    past_value_names: LayerName | None = None


class Outputs(Strict):
    logits: Name | None = None
    present_key_names: LayerName | None = None
    present_value_names: LayerName | None = None


class Window(Strict):
    """A prompt's pieces in a pipeline."""

    window_size: Count
    pad_value: Annotated[int, Field(ge=-1, le=_MANY)]
    alignment: Literal["left", "right"]
    slide_key_value_cache: bool


class Stage(Strict):
    """One graph of a pipeline."""

    filename: RelativePath
    inputs: Annotated[tuple[Name, ...], Field(max_length=4096)]
    outputs: Annotated[tuple[Name, ...], Field(max_length=4096)]
    session_options: SessionOptions
    run_on_prompt: bool | None = None
    run_on_token_gen: bool | None = None
    is_lm_head: bool | None = None


class Decoder(Strict):
    """The graph, or a pipeline of several."""

    filename: RelativePath | None = None
    session_options: SessionOptions = SessionOptions()
    head_size: Size | None = None
    hidden_size: Size | None = None
    num_attention_heads: Size | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_key_value_heads: Size | None = None
    inputs: Inputs = Inputs()
    outputs: Outputs = Outputs()
    sliding_window: Window | None = None
    pipeline: Annotated[tuple[dict[Name, Stage], ...], Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _one_or_many(self) -> Decoder:
        if any(len(stage) != 1 for stage in self.pipeline or ()):
            raise ValueError("a stage of the pipeline is not one name and what it stands for")
        return self


class GenaiModel(Strict):
    """The `model` section."""

    type: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$")]
    context_length: Count = Field(description="tokens of prompt and answer together")
    vocab_size: Annotated[int, Field(ge=1, le=1 << 26)]
    eos_token_id: TokenId | Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=1024)]
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    decoder: Decoder


class Search(Strict):
    do_sample: bool | None = None
    max_length: Count | None = None
    min_length: Annotated[int, Field(ge=0, le=_MANY)] | None = None
    num_beams: Literal[1] | None = None
    num_return_sequences: Literal[1] | None = None
    past_present_share_buffer: bool | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=1e6)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=1e6)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MANY)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    chunk_size: Count | None = None


class GenaiConfig(Strict):
    """A whole genai_config.json."""

    model: GenaiModel
    search: Search = Search()

    def as_json(self) -> str:
        """The file that says this and no more."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.context_length

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.model.vocab_size

    @property
    def shares_cache(self) -> bool:
        """Whether the graph writes new keys and values into the buffer it reads the past from."""
        return self.search.past_present_share_buffer is not False

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        eos = self.model.eos_token_id
        return frozenset((eos,) if isinstance(eos, int) else eos)


def parse_genai_config(path: Path) -> GenaiConfig:
    """Read a bundle's genai_config.json.

    Raises:
        BundleError: missing, malformed, a key that stands twice, a value out of its range, or a key that no bundle
            needs, named.
    """
    data = read_file(path, limit=CONFIG_LIMIT, error=BundleError, remedy=REMEDY)
    parse_json(data, where=path, error=BundleError, remedy=REMEDY)
    try:
        return GenaiConfig.model_validate_json(data, strict=True)
    except ValidationError as error:
        problem = first_problem(error).replace("Extra inputs are not permitted", "no bundle needs this key")
        raise BundleError(f"the configuration cannot be used: {problem}", where=path, remedy=REMEDY) from error
