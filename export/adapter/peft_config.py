"""What adapter_config.json of a PEFT adapter says. Every key is used, or has no effect on what is computed, or refused.

Source: huggingface/peft 0.21, src/peft/tuners/lora/config.py for the keys; tuners/tuners_utils.py
(`check_target_module_exists`) and utils/other.py (`get_pattern_key`) for what the names of modules mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgephi.child import call
from edgephi.errors import AdapterError, DeviceError
from edgephi.export.checkpoint.config import shown
from edgephi.export.lora import LARGEST_RANK
from edgephi.files import NO_LINK, read_json_object, require_inside

CONFIG = "adapter_config.json"
CONFIG_LIMIT = 2**20
AGAIN = "Save the adapter again with PEFT's `save_pretrained`"
MATCHING_S = 30
"""For a stranger's regular expressions, which can take for ever."""
LONGEST_PATTERN = 1000
MOST_PATTERNS = 4096

WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "parent_library",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Keys of training, of how PEFT loads, or of methods that another key switches on."""
_USED = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA, which begins in the middle of a prompt",
    "arrow_config": "a router between adapters",
    "bias": "biases that were trained as well",
    "corda_config": "an initialization that changes the base's weights",
    "fan_in_fan_out": "a base whose weights are transposed, which no family of edgephi's has",
    "kasa_config": "a base whose weights are changed",
    "layer_replication": "a base whose layers stand there several times",
    "loftq_config": "a base that was quantized for the training",
    "lora_bias": "biases of the adapter",
    "lora_ga_config": "an initialization that changes the base's weights",
    "megatron_config": "layers of Megatron",
    "modules_to_save": "modules that were trained as a whole",
    "monteclora_config": "another method than LoRA",
    "target_parameters": "an adapter of parameters, such as experts",
    "trainable_token_indices": "tokens that were trained",
    "use_bdlora": "another method than LoRA",
    "use_dora": "DoRA, which scales the base's columns",
    "use_qalora": "QALoRA, which adds up inputs",
    "velora_config": "another method than LoRA",
}
"""Keys whose value changes what is computed; one that is off is let through."""
_LEAVES_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initializations after which the base's weights are the published ones; PiSSA, OLoRA, CorDA and LoftQ change them."""
_PLAIN = re.compile(r"[\w.]+")

Value = TypeVar("Value")


@dataclass(frozen=True)
class PeftConfig:
    """An adapter's configuration, checked."""

    where: Path
    base_name: str | None
    """What the adapter was trained on, by its own words."""
    _targets: Sequence[str] | str
    _excluded: Sequence[str] | str
    _layers: frozenset[int] | None
    _rank: int
    _alpha: float
    _ranks: Mapping[str, int]
    _alphas: Mapping[str, float]
    _rank_stabilized: bool

    def targets(self, modules: Sequence[str]) -> list[str]:
        """Those of the base's linear modules, by their whole names, that the adapter updates.

        Raises:
            AdapterError: a pattern is no regular expression, or takes too long.
        """
        regexes = [f"(?:{one})" for one in (self._targets, self._excluded) if isinstance(one, str) and one]
        found = dict(zip(regexes, _matches(regexes, modules, self.where), strict=True))

        def matches(wanted: Sequence[str] | str, place: int) -> bool:
            if isinstance(wanted, str):
                return bool(wanted) and found[f"(?:{wanted})"][place]
            return any(modules[place] == one or modules[place].endswith(f".{one}") for one in wanted)

        chosen = []
        for place, module in enumerate(modules):
            if matches(self._excluded, place) or not matches(self._targets, place):
                continue
            spelt_out = not isinstance(self._targets, str) and module in self._targets
            layer = re.search(r"layers\.(\d+)\.", module)
            if self._layers is None or spelt_out or (layer is not None and int(layer[1]) in self._layers):
                chosen.append(module)
        return chosen

    def ranks_and_scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Rank of each module, and what B · A is multiplied by: alpha / rank, or with rsLoRA alpha / √rank.

        Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732).
        """
        ranks = _by_pattern(self._ranks, modules, self.where)
        alphas = _by_pattern(self._alphas, modules, self.where)
        chosen = {}
        for module in modules:
            rank = ranks.get(module, self._rank)
            alpha = alphas.get(module, self._alpha)
            chosen[module] = rank, alpha / (math.sqrt(rank) if self._rank_stabilized else rank)
        return chosen


def read_peft_config(folder: Path) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: it is missing, malformed, of something else than a LoRA for a language model, or asks for what
            edgephi does not build; key and value are named.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError("there is no such folder", where=folder, remedy="Name the folder that PEFT saved")
    if not path.exists():
        raise AdapterError(f"the folder has no {CONFIG}", where=folder, remedy="Name the folder that PEFT saved")
    require_inside(path, folder, AdapterError, NO_LINK)
    values = read_json_object(path, error=AdapterError, remedy=AGAIN, limit=CONFIG_LIMIT, finite=True)
    reader = _Values(values, path)
    for key in sorted(values):
        if key in _REFUSED and not _is_off(key, values[key]):
            raise reader.refusal(key, _REFUSED[key])
        if key not in _USED and key not in WITHOUT_EFFECT and key not in _REFUSED:
            raise reader.refusal(key, "a key that edgephi does not know")
    if values.get("peft_type") != "LORA":
        raise reader.refusal("peft_type", "no LoRA")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise reader.refusal("task_type", "no adapter of a model that generates text")
    init = values.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _LEAVES_THE_BASE):
        raise reader.refusal(
            "init_lora_weights",
            "an initialization that changes the base's weights",
            "Save it with `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )
    layers_pattern = values.get("layers_pattern")
    if layers_pattern not in (None, "", "layers", [], ["layers"]):
        raise reader.refusal("layers_pattern", "another name than the base's `layers`")
    targets = reader.modules("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ".*"
    if not targets:
        raise reader.refusal("target_modules", "no module at all")
    layers = reader.layers()
    if layers is not None and isinstance(targets, str):
        raise reader.refusal("layers_to_transform", "a second choice beside a regular expression")
    return PeftConfig(
        where=path,
        base_name=reader.base_name(),
        _targets=targets,
        _excluded=reader.modules("exclude_modules"),
        _layers=layers,
        _rank=reader.rank("r", values.get("r", 8)),
        _alpha=reader.alpha("lora_alpha", values.get("lora_alpha", 8)),
        _ranks={key: reader.rank("rank_pattern", value) for key, value in reader.pattern("rank_pattern").items()},
        _alphas={key: reader.alpha("alpha_pattern", value) for key, value in reader.pattern("alpha_pattern").items()},
        _rank_stabilized=reader.flag("use_rslora"),
    )


def _is_off(key: str, value: object) -> bool:
    return value is None or value is False or value in ([], {}, "") or (key == "bias" and value == "none")


@dataclass(frozen=True)
class _Values:
    """Values of the keys, by kind."""

    values: Mapping[str, object]
    where: Path

    def refusal(self, key: str, why: str, remedy: str | None = None) -> AdapterError:
        return AdapterError(
            f"{key} is {shown(self.values.get(key))}: {why}",
            where=self.where,
            remedy=remedy or "Train the adapter without it, or merge it into the base model and export that",
        )

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "neither true nor false", AGAIN)
        return bool(value)

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= LARGEST_RANK:
            raise self.refusal(key, f"a rank is a whole number from 1 to {LARGEST_RANK}")
        return value

    def alpha(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise self.refusal(key, "an alpha is a number", AGAIN)
        return float(value)

    def base_name(self) -> str | None:
        value = self.values.get("base_model_name_or_path")
        if value is not None and (not isinstance(value, str) or len(value) > 500):
            raise self.refusal("base_model_name_or_path", "no name", AGAIN)
        return value or None

    def modules(self, key: str) -> Sequence[str] | str:
        """Names, or one regular expression."""
        value = self.values.get(key)
        if value is None:
            return ()
        names = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        whole = len(names) == (len(value) if isinstance(value, list) else 1)
        if not whole or len(names) > MOST_PATTERNS or any(len(one) > LONGEST_PATTERN for one in names):
            raise self.refusal(key, "neither a list of names nor a regular expression", AGAIN)
        return value if isinstance(value, str) else names

    def layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise self.refusal("layers_to_transform", "neither a number nor a list of numbers", AGAIN)
        return frozenset(numbers) or None

    def pattern(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key) or {}
        if (
            not isinstance(value, dict)
            or len(value) > MOST_PATTERNS
            or any(len(one) > LONGEST_PATTERN for one in value)
        ):
            raise self.refusal(key, "no object of patterns", AGAIN)
        return value


def _by_pattern(given: Mapping[str, Value], modules: Sequence[str], where: Path) -> dict[str, Value]:
    """The value of the first pattern that matches the end of a module's name."""
    regexes = {key: rf"(?:.*\.)?(?:{key})" for key in given}
    plain = {key: regex for key, regex in regexes.items() if _PLAIN.fullmatch(key)}
    strange = [regex for key, regex in regexes.items() if key not in plain]
    found = dict(zip(strange, _matches(strange, modules, where), strict=True))
    chosen: dict[str, Value] = {}
    for key, value in given.items():
        for place, module in enumerate(modules):
            matched = bool(re.fullmatch(plain[key], module)) if key in plain else found[regexes[key]][place]
            if matched:
                chosen.setdefault(module, value)
    return chosen


def _matches(regexes: Sequence[str], modules: Sequence[str], where: Path) -> list[list[bool]]:
    """Which of a stranger's regular expressions match which names, tried in a process that can be ended."""
    if not regexes:
        return []
    arguments = {"regexes": list(regexes), "names": list(modules)}
    try:
        found = call("edgephi.export.adapter.peft_config:match_names", arguments, timeout_s=MATCHING_S, where=where)
    except DeviceError as problem:
        raise AdapterError(
            f"a regular expression for modules cannot be used: {problem.what}",
            where=where,
            remedy="Write the names of the modules into adapter_config.json instead",
        ) from problem
    assert isinstance(found, list)
    return found


def match_names(regexes: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    """In the child process: which expressions match which names as a whole."""
    return [[re.fullmatch(regex, name) is not None for name in names] for regex in regexes]
