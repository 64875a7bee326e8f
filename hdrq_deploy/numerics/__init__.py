"""Numbers without files: code ranges, quantization, BatchNorm folded into scales."""
