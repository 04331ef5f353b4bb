"""Pretrained models: loading, heads, generation, likelihood, endpoints."""
