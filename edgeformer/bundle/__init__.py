"""Bundles: ordinary Hugging Face ONNX folders with a manifest. Opening, checking and writing them."""
