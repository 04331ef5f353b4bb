"""Measure a model: responses to test examples, their scores, and general abilities."""
