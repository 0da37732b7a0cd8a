"""LoRA adapters at rest: their files, their layout, and what they stand for."""
