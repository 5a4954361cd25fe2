"""Small PyTorch Transformers without cache code, and the way back from a checkpoint folder to a module."""

from edgeformer.models.checkpoint import load_checkpoint
from edgeformer.models.decoder import CausalLM, DecoderConfig
from edgeformer.models.encoder import EncoderConfig, Transformer

__all__ = ["CausalLM", "DecoderConfig", "EncoderConfig", "Transformer", "load_checkpoint"]
