"""What users can put right: errors whose text says all they need, and whose traceback says nothing more."""


class InputError(ValueError):
    """Input that cannot be used as it is; the message names the rule, the offender with its numbers, and the remedy."""


class RemoteError(InputError):
    """Another rank of the group refused the input; the text is that rank's own error."""
