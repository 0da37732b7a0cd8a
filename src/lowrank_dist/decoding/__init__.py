"""Decoding of quantized checkpoints: every rank decodes the rows that it reads."""
