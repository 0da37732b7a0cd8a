"""Layers that compute in a training step: frozen layers, stacks of experts, folded adapters."""
