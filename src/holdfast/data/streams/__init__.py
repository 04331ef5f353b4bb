"""Benchmarks by name: one YAML file a stream, and the makers of those that no folders hold."""
