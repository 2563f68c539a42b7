"""Pixels: files and PIL images on one side, float tensors on the other; sizes and colours."""
