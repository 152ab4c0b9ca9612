"""Text that tokenizers get wrong, and stock onnxruntime-genai as a second reader of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HARD_TEXTS = (
    "1234567",
    "pi is 3.14159e-10, 42 and 007",
    "a  1   22    333",
    "٣٤ ½ ² Ⅷ १२",
    "def f(x):\n\tif x:\n\t\treturn x + 1\n    return 2\n",
    "# include <stdio.h>\n        int main(){}\r\n",
    'foo -(); x }( }}{% "%; (=\',b :">>;- [[]] {{}} != === ->',
    "  leading and  double",
    "trailing   ",
    "     ",
    " ",
    "\n\n\n x \n\n",
    "\r\n\r\n a\tb\t\t\tc",
    " \u00a0\u3000\u2009x",
    "😀👩‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽",
    "漢字かな交じり文 한국어 中文，测试。",
    "مرحبا بالعالم ﷺ",
    "café naïve ÀÉÎ",
    "cafe\u0301 nai\u0308ve A\u0300",
    "ß ſ ﬁ 𝔘𝔫𝔦 \ufeff\u200b\u00ad\x80",
    "it's I'LL they've DON'T 'S 'T",
    "snake_case camelCase HTMLParser XMLHttpRequest2 ABCdef",
    "https://a.b/c?d=e&f#g user@host",
    "Ġ▁ <0x0A> <pad>",
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "a<|endoftext|>b <|endoftext|>  <|end|>   next</s> <s> <unk>",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
)


def genai_tokenizer(folder: Path) -> Any:
    """`og.Tokenizer` of a folder with tokenizer files; the genai_config.json it wants is put beside them."""
    import onnxruntime_genai as og

    decoder = {"head_size": 1, "hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = {"type": "llama", "bos_token_id": 0, "eos_token_id": [0], "pad_token_id": 0, "context_length": 1}
    config = {"model": {**model, "vocab_size": 1, "decoder": decoder}, "search": {"max_length": 1}}
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return og.Tokenizer(str(folder))
