"""Tokens for training and evaluation: tokenizers, prepared shards, the embedded corpus and the batches made of them."""
