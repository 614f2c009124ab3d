"""The seam to onnx_ir: loading, saving, editing and printing graphs."""
