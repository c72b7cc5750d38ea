"""Tokens for training and evaluation: tokenizers, prepared shards, the embedded corpus and batches
made from them.
"""
