"""Reads an ONNX file as a PyTorch network, and writes the same file again with smaller layers."""
