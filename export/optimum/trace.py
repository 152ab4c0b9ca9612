"""The process in which torch runs: transformers loads a checkpoint, optimum-onnx traces it to a float32 graph.

A process of its own, because torch does not give its memory back. `export/optimum/export.py` calls `report` there.

The graph is not believed: before the process ends, onnxruntime runs it in three pieces (prefill, prefill on a cache,
one token), and the logits have to be those of transformers.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgephi.errors import EdgephiError, UnsupportedModelError, WeightError, one_line
from edgephi.export.checkpoint.folder import CONFIG_LIMIT, read_object
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.ort import ERRORS, open_session, session_options

TASK = "text-generation-with-past"

CHECKED_TOKENS = 24

LARGEST_DIFFERENCE = 1e-2
"""Of a logit's standard deviation. Float32 rounding stays 100 times below, a wrong graph is at 0.1 or more."""

# Their angles are constants. dynamic and longrope change theirs with the length of the sequence, which a trace freezes.
TRACEABLE_ROPES = frozenset({"default", "linear", "llama3", "yarn"})

_OTHER_CHECKPOINT = "Use a checkpoint of a model that optimum-onnx exports for text generation"

SETTINGS = {
    "FORCE_ONNX_EXTERNAL_DATA": "1",  # optimum-onnx: weights beside the graph, whatever their size
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def report(checkpoint: str, folder: str) -> dict[str, object]:
    """Called in the child: trace, quietly and offline.

    Args:
        checkpoint, folder: as in `trace`.

    Returns:
        What `trace` returns, or `refusal`: the class and the parts of the error.
    """
    os.environ.update(SETTINGS)  # read when the libraries are imported, which is later
    warnings.simplefilter("ignore")
    try:
        return trace(Path(checkpoint), Path(folder))
    except (UnsupportedModelError, WeightError) as error:
        refusal: EdgephiError = error
    except EdgephiError as error:
        what = f"optimum-onnx could not trace the model: {error.what}"
        refusal = UnsupportedModelError(what, where=checkpoint, remedy=_OTHER_CHECKPOINT)
    except Exception as error:
        refusal = UnsupportedModelError(
            f"optimum-onnx could not trace the model: {type(error).__name__}: {one_line(error)}",
            where=checkpoint,
            remedy=_OTHER_CHECKPOINT,
        )
    parts = {"what": refusal.what, "where": refusal.where, "remedy": refusal.remedy}
    return {"refusal": {"kind": type(refusal).__name__, **parts}}


def trace(checkpoint: Path, folder: Path) -> dict[str, object]:
    """Trace the checkpoint to model.onnx and its data in the folder.

    Returns:
        The model's facts (counts; what the model does not have is left out) and `difference`: the largest one between
        the logits of graph and transformers, in standard deviations of a logit.

    Raises:
        UnsupportedModelError: transformers or optimum-onnx do not have the model, or the graph computes something else.
        WeightError: the checkpoint's tensors are not exactly the model's.
    """
    import torch
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import AutoModelForCausalLM

    config = read_config(checkpoint)
    _require_task(config.model_type, checkpoint)
    facts = _facts(config, checkpoint)
    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,  # never a pickle
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _require_same_tensors(loading, checkpoint)
    require_used_head(model, checkpoint)
    model.eval()
    token_ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, CHECKED_TOKENS))
    with torch.no_grad():
        expected = model(torch.from_numpy(token_ids)).logits[0].numpy()
    facts["parameters"] = model.num_parameters()
    # Unfolded, a weight stays as published, [outputs, inputs], and a tied embedding stays one tensor;
    # onnxruntime folds the constants when it loads the graph.
    onnx_export_from_model(
        model, folder, task=TASK, device="cpu", do_validation=False, no_post_process=True, do_constant_folding=False
    )
    del model
    gc.collect()
    difference = float(np.abs(_logits(folder / "model.onnx", token_ids) - expected).max() / expected.std(-1).mean())
    if not difference < LARGEST_DIFFERENCE:
        raise UnsupportedModelError(
            f"the graph optimum-onnx traced differs from the model by {difference:.2g} standard deviations of a logit",
            where=checkpoint.name,
            remedy=_OTHER_CHECKPOINT,
        )
    return facts | {"difference": difference}


def _facts(config: Any, checkpoint: Path) -> dict[str, object]:
    """What bundle and onnxruntime-genai want to know and the graph does not say; families use different keys."""
    keys = {
        "family": ("model_type",),
        "hidden_size": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "context_length": ("max_position_embeddings", "max_seq_len", "seq_length"),
        "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
        "sliding_window": ("sliding_window",),
    }
    found = {fact: [getattr(config, key, None) for key in names] for fact, names in keys.items()}
    facts: dict[str, object] = {fact: next(filter(None, values), None) for fact, values in found.items()}
    for fact in ("hidden_size", "heads", "context_length"):
        if facts[fact] is None:
            raise UnsupportedModelError(
                f"the configuration has none of {', '.join(keys[fact])}",
                where=checkpoint / "config.json",
                remedy=f"Add {keys[fact][-1]} to it" if fact == "context_length" else _OTHER_CHECKPOINT,
            )
    return facts


def read_config(checkpoint: Path) -> Any:
    """The checkpoint's configuration as transformers 4.57 understands it.

    transformers 5 writes `rope_parameters` where transformers 4 reads `rope_theta` and `rope_scaling`. transformers 4
    ignores what it does not know and would run with the wrong angles, so the key is translated, or refused.

    Raises:
        UnsupportedModelError: a model transformers 4.57 does not have, or positions that a trace cannot hold.
    """
    import inspect

    from transformers import AutoConfig

    path = checkpoint / "config.json"
    values = read_object(path, CONFIG_LIMIT)
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers does not have the model: {str(error).splitlines()[0]}", where=path, remedy=_OTHER_CHECKPOINT
        ) from error
    if "rope_parameters" in values:
        kind = type(config)
        config = kind.from_dict(values | transformers_4_rope(values, inspect.signature(kind).parameters, path))
    scaling = getattr(config, "rope_scaling", None) or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope not in TRACEABLE_ROPES:
        raise UnsupportedModelError(
            f"rope type {rope!r} changes with the length of the sequence, which a traced graph cannot do",
            where=path,
            remedy="Use a checkpoint of a family edgephi builds itself, without --via optimum",
        )
    return config


def transformers_4_rope(values: Mapping[str, object], accepted: Collection[str], where: Path) -> dict[str, object]:
    """transformers 5's `rope_parameters` in the keys of transformers 4.

    Args:
        values: config.json.
        accepted: keys the model's transformers-4 configuration has.
        where: config.json's place, for errors.

    Raises:
        UnsupportedModelError: they cannot be said in those keys.
    """
    rope = values["rope_parameters"]
    words: dict[str, object] = {}
    if isinstance(rope, dict):
        rest = dict(rope)
        words = {key: rest.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rest}
        if rest.get("rope_type", "default") != "default":
            words["rope_scaling"] = rest
        elif rest.keys() - {"rope_type"}:
            words = {}
    if "rope_theta" not in words or words.keys() - set(accepted):
        raise UnsupportedModelError(
            f"rope_parameters is {rope!r}, which transformers 4.57 cannot express for {values.get('model_type')!r}",
            where=where,
            remedy="Use a checkpoint that was saved with transformers 4, or one of a family edgephi builds itself",
        )
    return words


def _require_task(model_type: str, checkpoint: Path) -> None:
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the models
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if TASK not in tasks:
        raise UnsupportedModelError(
            f"model_type is {model_type!r}, which optimum-onnx does not export for {TASK}",
            where=checkpoint / "config.json",
            remedy=_OTHER_CHECKPOINT,
        )


def _require_same_tensors(loading: Mapping[str, Collection[Any]], checkpoint: Path) -> None:
    """transformers only warns when a weight is missing (it then is random), of another shape, or left unread."""
    for key, what in (
        ("missing_keys", "has no tensor"),
        ("mismatched_keys", "has another shape of"),
        ("unexpected_keys", "has a tensor the model does not read:"),
    ):
        if loading[key]:
            names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in loading[key])
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise WeightError(
                f"the checkpoint {what} {names[0]}{more}",
                where=checkpoint.name,
                remedy="Use config.json and weights of the same checkpoint, saved with transformers 4",
            )


def require_used_head(model: Any, checkpoint: Path) -> None:
    """transformers 4.57 ties head and embedding where the configuration says so, and drops a head that differs.

    Raises:
        WeightError: the checkpoint holds such a head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    ref = open_folder(checkpoint).tensors.get(f"{name}.weight")
    step = 1 << 12
    for start in range(0, 0 if ref is None else ref.shape[0], step):
        assert ref is not None
        rows = read_rows(ref, start, min(start + step, ref.shape[0]))
        if not np.array_equal(rows, embedding.weight[start : start + step].detach().float().numpy()):
            raise WeightError(
                f"tensor {ref.name} differs from the embedding, and tie_word_embeddings is true",
                where=ref.file,
                remedy="Set tie_word_embeddings to false in config.json if the model has a head of its own",
            )


def _logits(graph: Path, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of the float32 graph, fed with half of the tokens, most of the rest, the last one."""
    session = open_session(graph, session_options(log_level=ERRORS), where=graph.name, remedy=_OTHER_CHECKPOINT)
    inputs = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    length = token_ids.shape[1]
    rows = []
    for start, stop in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
        feed = {
            "input_ids": token_ids[:, start:stop],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop)[None],
        }
        outputs = session.run(None, {name: value for name, value in feed.items() if name in inputs} | past)
        rows.append(outputs[0][0])
        past = dict(zip(past, outputs[1:], strict=True))
    return np.concatenate(rows)
