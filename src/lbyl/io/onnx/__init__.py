"""ONNX files in and out: a file as a network of PyTorch's, and the same file again, smaller."""
