"""The published layout of PiSSA on disk: a residual model with its initial adapter beside it."""
