"""From a trained network to a file that is fast: folding, ONNX graphs, checks against PyTorch, timings."""
