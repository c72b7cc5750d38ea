"""fp8jax: language-model pre-training with every matrix multiplication of the transformer block in FP8.

Letters in array names: b batch, t time, s key time, d model width, n heads, k KV heads, g query heads a KV head, h head
dim, f FFN width, v vocabulary, l layers.
"""
