"""Weights: model folders, bases, names, and readers of released checkpoints."""
