"""The bundle: an ordinary Hugging Face ONNX folder with a manifest. Opened once, checked once."""
