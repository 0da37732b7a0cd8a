"""Errors that users can correct; the message is sufficient, and commands print it without a traceback."""

__all__ = ["CheckpointError", "InputError", "ModelError", "RemoteError"]


class InputError(ValueError):
    """Input that cannot be used; the message names the rule, the offender with its numbers, and the remedy."""


class RemoteError(InputError):
    """Another rank of the group refused the input; the message is that rank's error."""


class ModelError(InputError):
    """A model or adapter configuration that cannot be trained as requested; the message names the layer and the remedy."""


class CheckpointError(InputError):
    """Pretrained weights, an adapter or a checkpoint that cannot be read; the message names the file, the tensor and the remedy."""
