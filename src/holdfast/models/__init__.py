"""Pretrained models: loading, heads, generation, sampling, likelihood, endpoints, conversion."""
