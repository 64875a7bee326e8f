"""Quantized ONNX graphs: their patterns, edits and sessions that run them."""
