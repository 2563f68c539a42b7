"""Measurements of speed and memory: our paths beside a plain reference, on the same weights and inputs, in one run."""
