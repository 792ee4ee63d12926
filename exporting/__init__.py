"""A trained agent as ONNX graphs, which run where there is no PyTorch."""
