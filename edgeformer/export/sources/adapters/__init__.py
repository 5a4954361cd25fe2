"""Merges PEFT adapters into the weights of their base model."""
