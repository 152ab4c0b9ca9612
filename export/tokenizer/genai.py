"""Does stock onnxruntime-genai read the bundle's tokenizer as edgephi does? Both encode the same texts.

onnxruntime-genai has a tokenizer of its own. `export/tokenizer/pre_tokenizers.py` and
`export/tokenizer/space_prefix.py` write the files in forms that both read alike; what no form can express is found here
and recorded in edgephi.json. Both libraries run in a child process, within a time: a stranger's patterns and tokens are
the input of native code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from edgephi.bundle import TokenizerFacts
from edgephi.child import call
from edgephi.errors import DeviceError, TokenizerError
from edgephi.export.tokenizer.check import QUESTIONS
from edgephi.export.tokenizer.files import TokenizerFiles, write
from edgephi.export.tokenizer.genai_child import DONE, STARTED
from edgephi.manifest import UNREAD

SECONDS = 30.0
"""For the child process; it takes half a second."""

# What readers are known to read differently, each with words for a sentence.
_TEXTS = (
    ("plain text", "The quick brown fox, aged 42, can't jump over 'the' lazy dog. It costs 3.50 (or more)!"),
    ("text that begins with a space", " leading space"),
    ("text that begins with a no-break or an ideographic space", "\u3000\u00a0indented"),
    ("a no-break space behind a space", "about \u00a0five \u00a0 or six\u00a0seven"),
    ("several spaces before a digit", "a  1   22"),
    ("spaces and new lines", "def f(x):\n\tif x:\n\t\treturn  x\n\n    # end \n"),
    ("letters outside of ASCII", "Größe naïve 漢字かな 한국어 مرحبا नमस्ते 😀👍🏽"),
    ("letters written as two characters", "cafe\u0301 nai\u0308ve"),
)


@dataclass(frozen=True)
class _Probe:
    name: str
    text: str


def compare_with_genai(files: TokenizerFiles, where: object) -> TokenizerFacts:
    """What edgephi.json says about the tokenizer.

    Args:
        where: the checkpoint, for errors.

    Raises:
        TokenizerError: the tokenizer takes too long for short texts, or ends the process that runs it.
        DeviceError: no child process can be started (step `process`).
    """
    probes = _probes(files)
    with TemporaryDirectory(prefix="edgephi-") as name:
        folder = Path(name)
        write(files, folder)
        (folder / "genai_config.json").write_text(json.dumps(_genai_config()), encoding="utf-8")
        try:
            answer = call(
                "edgephi.export.tokenizer.genai_child:read_alike",
                {"folder": name, "texts": [probe.text for probe in probes]},
                timeout_s=SECONDS,
                where=where,
            )
        except DeviceError as error:
            if not (folder / STARTED).is_file():
                raise
            if not (folder / DONE).is_file():
                raise TokenizerError(
                    f"the tokenizer does not get through short texts: {error.what}",
                    where=where,
                    remedy="Use the tokenizer of the published model",
                ) from error
            answer = {"version": None, "fault": error.what}
    assert isinstance(answer, dict)
    if (said := answer.get("refused")) is not None:
        raise TokenizerError(
            f"the tokenizers library breaks off at a short text: {said}",
            where=where,
            remedy="Use the tokenizer of the published model",
        )
    version = answer.get("version")
    against = None if version is None else f"onnxruntime-genai {version}"
    if (fault := answer.get("fault")) is not None:
        return _facts(files, against, (f"{UNREAD}: {fault}"[:300],))
    same = answer["same"]
    return _facts(files, against, tuple(probe.name for probe, alike in zip(probes, same, strict=True) if not alike))


def _probes(files: TokenizerFiles) -> list[_Probe]:
    """Texts as they reach the model: under a chat template, questions in a conversation."""
    probes = [_Probe(name, text) for name, text in _TEXTS]
    probes += [_Probe(f"white space beside {token!r}", text) for token, text in _beside(files)]
    if not files.conversation:
        return probes
    # a template may write one of the questions in another way, without line breaks or in quotes
    question = next((question for question in QUESTIONS if question in files.conversation), None)
    asked = probes
    if question is not None:
        asked = [_Probe(probe.name, files.conversation.replace(question, probe.text)) for probe in probes]
    return [
        _Probe("a conversation", files.conversation),
        *asked,
        _Probe("text that is not put through the chat template", _TEXTS[0][1]),
    ]


def _facts(files: TokenizerFiles, against: str | None, differences: Sequence[str]) -> TokenizerFacts:
    return TokenizerFacts(
        compared_with=against,
        differences=tuple(differences),
        dropped_roles=files.dropped_roles,
        notes=files.notes,
    )


def _beside(files: TokenizerFiles) -> list[tuple[str, str]]:
    """For each way in which added tokens treat what is beside them, one token and a text that shows it."""
    added = json.loads(files.tokenizer_json)["added_tokens"]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    kinds = {tuple(bool(token.get(flag)) for flag in flags): str(token["content"]) for token in reversed(added)}
    return [
        (content, f"one \n{content} \t two {content}three{content}")
        for kind, content in kinds.items()
        if any(kind) and content.strip()
    ]


def _genai_config() -> dict[str, object]:
    """The least that onnxruntime-genai wants beside a tokenizer."""
    decoder = {"head_size": 1, "hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = {"type": "llama", "bos_token_id": 0, "eos_token_id": [0], "pad_token_id": 0, "context_length": 1}
    return {"model": {**model, "vocab_size": 1, "decoder": decoder}, "search": {"max_length": 1}}
