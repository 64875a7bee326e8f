"""Is an engine the model it was made from: verification, and sensitivity of layers."""
