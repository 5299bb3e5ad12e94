"""What turns a PyTorch model into an ONNX graph, and a graph into one of fewer bits."""
