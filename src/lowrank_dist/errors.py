"""Errors that users can correct; the message is sufficient, and commands print it without a traceback."""

__all__ = ["CheckpointError", "InputError", "ModelError", "RemoteError"]


class InputError(ValueError):
    """Input that cannot be used; the message names the rule, the offender with its numbers, and the remedy.

    See Also
    --------
    ModelError, CheckpointError : The subclasses for models and for files.

    Examples
    --------
    >>> from lowrank_dist import InputError, PiSSA
    >>> try:
    ...     PiSSA(oversampling=-1)
    ... except InputError as error:
    ...     print("refused")
    refused
    """


class RemoteError(InputError):
    """Another rank of the group refused the input; the message is that rank's error.

    See Also
    --------
    lowrank_dist.distributed.group.ShardGroup.shared_errors : Raises it on the ranks that have no error of their own.

    Examples
    --------
    >>> from lowrank_dist.errors import InputError, RemoteError
    >>> issubclass(RemoteError, InputError)
    True
    """


class ModelError(InputError):
    """A model or adapter configuration that cannot be trained; the message names the layer and the remedy.

    See Also
    --------
    CheckpointError : For files that cannot be read.

    Examples
    --------
    >>> from torch import nn
    >>> from lowrank_dist import ModelError
    >>> from lowrank_dist.model.skeleton import find_backbone
    >>> try:
    ...     find_backbone(nn.Linear(2, 2))
    ... except ModelError:
    ...     print("no transformers model inside")
    no transformers model inside
    """


class CheckpointError(InputError):
    """Weights, an adapter or a checkpoint that cannot be read; the message names file, tensor and remedy.

    See Also
    --------
    lowrank_dist.inspect : Describes a directory and names what is missing.

    Examples
    --------
    >>> from lowrank_dist import CheckpointError, convert_checkpoint
    >>> try:
    ...     convert_checkpoint("/nowhere", "lora")
    ... except CheckpointError:
    ...     print("refused")
    refused
    """
