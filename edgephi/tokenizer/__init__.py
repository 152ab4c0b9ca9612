"""A stranger's tokenizer.json: what is in it, how large it may be, and encoding with it within bounds."""
