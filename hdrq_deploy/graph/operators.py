"""The operators of ONNX that this library tells apart, by what they mean for quantized values.

This is the one table of operators: a module that needs another selection derives it from these
sets and says why. Placement of quantizers decides on PyTorch's operators, which are other names,
in ``calibration/placement.py``.
"""

from __future__ import annotations

__all__ = [
    "CLAMPS",
    "LAYERS",
    "LINEAR",
    "MOVES_VALUES",
    "NEVER_AMPLIFIES",
    "POOLS",
    "QDQ",
    "QUANTIZABLE",
    "REQUANTIZED",
    "WITHIN_RANGE",
]

# Matrix products. MatMul may multiply two activations; Gemm has a weight.
LINEAR = frozenset({"Gemm", "MatMul"})
# Operators that engines can compute on codes. A transposed convolution is not one of them: no
# engine has an INT8 kernel for it.
QUANTIZABLE = LINEAR | {"Conv"}
# All operators that hold a weight or multiply two activations: the layers of a manifest.
LAYERS = QUANTIZABLE | {"ConvTranspose"}
# Activation functions that kernels compute together with the layer in front.
CLAMPS = frozenset({"Relu", "Clip"})
QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Where one of these lies in front of a layer, engines look for a second QuantizeLinear and
# DequantizeLinear behind it, and compute in float where there are none.
REQUANTIZED = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool"})
# Operators whose output holds values of their first input only. Codes pass through unchanged,
# with the scale that they had.
MOVES_VALUES = REQUANTIZED | {"Split", "Slice", "Gather", "Identity"}
# Operators that average.
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
# Operators whose output lies between the least and the largest value of their inputs, or 0.
WITHIN_RANGE = MOVES_VALUES | CLAMPS | POOLS | {"Concat", "Pad", "Resize"}
# Operators whose output moves by no more than the sum of what their inputs move by.
NEVER_AMPLIFIES = WITHIN_RANGE | {"Add", "Sub", "Max", "Sigmoid", "Tanh", "Softmax"}
