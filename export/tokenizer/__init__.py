"""The checkpoint's tokenizer and chat template become the files of a bundle, which two readers read alike."""
