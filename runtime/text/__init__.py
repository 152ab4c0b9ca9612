"""Texts become tokens and tokens texts: the chat template, the tokenizer, and an answer's text while it comes."""
