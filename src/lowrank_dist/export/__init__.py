"""What leaves: LoRA adapters for the original model, and merged models."""
