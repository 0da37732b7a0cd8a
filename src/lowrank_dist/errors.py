"""Errors that users can correct: the message is complete, and a traceback adds nothing to it."""

__all__ = ["CheckpointError", "InputError", "ModelError", "RemoteError"]


class InputError(ValueError):
    """Input that cannot be used as it is; the message names the rule, the offender with its numbers, and the remedy."""


class RemoteError(InputError):
    """Another rank of the group refused the input; the text is that rank's own error."""


class ModelError(InputError):
    """A model or adapter configuration that cannot be trained as asked; the message names layer and remedy."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read as it is; the message names the file, the tensor and the remedy."""
