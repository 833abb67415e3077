"""Loading a model: weights, tokenizer, prompts, think tags, fingerprint, and the check of its layout."""
