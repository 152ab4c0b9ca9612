"""The process in which two libraries encode the same texts; `export/tokenizer/genai.py` calls it.

It imports little, because it starts anew for every export.
"""

from __future__ import annotations

from pathlib import Path

from edgephi.errors import one_line

STARTED = "child.started"
"""A file in the folder that says: what goes wrong from here on is the tokenizer's doing."""
DONE = "reference.done"
"""A file in the folder that says: the `tokenizers` library has read all texts."""

# The same few characters again and again, of each kind that patterns tell apart: what takes time in proportion to a
# power of a text's length takes too long here.
_LONG = tuple(piece * (4_000 // len(piece)) for piece in ("a", "A", "1", " ", "\n", "漢", "!", "aB1 ", "é, ", "a\n\n"))


def read_alike(folder: str, texts: list[str]) -> dict[str, object]:
    """Encode texts with both libraries.

    Args:
        folder: with tokenizer.json, tokenizer_config.json and genai_config.json.

    Returns:
        `refused` with the words of the `tokenizers` library when it breaks off; else `version` of onnxruntime-genai,
        and `same` for each text, or `fault` when it does not read the folder.
    """
    from tokenizers import Tokenizer

    (Path(folder) / STARTED).touch()
    _bound_memory()
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        reference = [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        for text in _LONG:
            tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:  # its panics are no Exception
        return {"refused": one_line(error)}
    (Path(folder) / DONE).touch()
    version = None
    try:
        import onnxruntime_genai as og

        version = str(og.__version__)
        genai = og.Tokenizer(folder)
        same = [[int(token) for token in genai.encode(text)] == ids for text, ids in zip(texts, reference, strict=True)]
    except Exception as error:
        return {"version": version, "fault": one_line(error)}
    return {"version": version, "same": same}


def _bound_memory() -> None:
    """At most 8 GiB of address space, where the system knows such a bound."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
