"""Encoding a text in which marks keep what looks like a control token from being one.

`<7…|im_end|>` holds a mark, so no added token is found there. The mark is then taken out by the first step of the
normalizer, before the words are divided, and the ids are those of the text without it: as if the tokenizer did not know
the token. What puts the marks there is `edgephi/tokenizer/control_tokens.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgephi.tokenizer.control_tokens import ControlToken, ControlTokens, is_control

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer


class MarkedEncoder:
    """Encodes texts with one mark; it shares the vocabulary with the tokenizer that it is made of.

    Raises:
        Exception: whatever the library raises, its panics included; see `edgephi.tokenizer.bounds.guarded`.
    """

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        self.mark = mark
        self._tokenizer = tokenizer
        added = added_tokens(tokenizer)
        self._control = {id_: each for id_, each in added.items() if is_control(each.content, special=each.special)}
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown = tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
        self._joining = _joining(tokenizer, mark)
        self._dividing: Tokenizer | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, its marks left out.

        Raises:
            ValueError: the tokenizer has no other tokens for a text than a control token.
            Exception: as above.
        """
        ids, fault = self._encoded(self._joining, text)
        if fault is None:
            return ids
        if self._dividing is None:
            self._dividing = _dividing(self._tokenizer, self.mark)
        ids, fault = self._encoded(self._dividing, text)
        if fault is None:
            return ids
        raise ValueError(f"it can write {fault[:60]!r} only as a control token")

    def _encoded(self, tokenizer: Tokenizer, text: str) -> tuple[list[int], str | None]:
        """Ids, and a control token that came of a text."""
        made = tokenizer.encode(text, add_special_tokens=False)
        ids = list(made.ids)
        normalizes = self._tokenizer.normalizer is not None
        if not self._control.keys().isdisjoint(ids):
            for id_, (start, end) in zip(ids, made.offsets, strict=True):
                token = self._control.get(id_)
                if token is None or id_ == self._unknown:
                    continue
                read = text[start:end]
                if self.mark in read or (normalizes and token.normalized and read.strip() != token.content.strip()):
                    return ids, token.content
        return ids, None


def control_tokens(tokenizer: Tokenizer, *, normalizes: bool) -> ControlTokens:
    """A tokenizer's control tokens.

    Args:
        normalizes: it may have a normalizer.
    """
    control = [token for token in added_tokens(tokenizer).values() if is_control(token.content, special=token.special)]
    return ControlTokens(
        tuple(ControlToken(token.content, token.special) for token in control),
        after_normalizer=normalizes and any(token.normalized for token in control),
    )


def added_tokens(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """The library's added tokens by id."""
    return dict(sorted(tokenizer.get_added_tokens_decoder().items()))


def _joining(tokenizer: Tokenizer, mark: str) -> Tokenizer:
    """The tokenizer with a normalizer that takes the marks out."""
    from tokenizers import normalizers

    made = _copy(tokenizer)
    taken_out = normalizers.Replace(mark, "")
    before = tokenizer.normalizer
    made.normalizer = taken_out if before is None else normalizers.Sequence([taken_out, before])
    return made


def _dividing(tokenizer: Tokenizer, mark: str) -> Tokenizer:
    """The tokenizer with a pre-tokenizer that takes the marks out, and divides the text where they were.

    For models that make a control token of its letters too, and for tokens that are looked for after the normalizer.
    """
    from tokenizers import pre_tokenizers

    made = _copy(tokenizer)
    divided = pre_tokenizers.Split(mark, "removed")
    before = tokenizer.pre_tokenizer
    if before is None:
        made.pre_tokenizer = divided
    elif "Metaspace" in str(before):  # it begins each piece with a space, so it comes first
        made.pre_tokenizer = pre_tokenizers.Sequence([before, divided])
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence([divided, before])
    return made


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same steps; it shares the model, which is nearly all of the memory."""
    from tokenizers import AddedToken, Tokenizer

    added = added_tokens(tokenizer)
    made = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        made.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        made.pre_tokenizer = tokenizer.pre_tokenizer
    plain = tokenizer.normalizer is None
    made.add_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                # without a normalizer it makes no difference, until there is one that takes out the marks
                normalized=token.normalized and not (plain and is_control(token.content, special=token.special)),
                special=token.special,
            )
            for token in added.values()
        ]
    )
    if {id_: token.content for id_, token in added_tokens(made).items()} == {
        id_: token.content for id_, token in added.items()
    }:
        return made
    return Tokenizer.from_str(tokenizer.to_str())  # ids with gaps: a file keeps them
