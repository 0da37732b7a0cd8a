"""LoRA adapters on disk: their files, the model that they are for, and the exact LoRA for the original model."""
