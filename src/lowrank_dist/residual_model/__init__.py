"""Residual models on disk, in the layout that the authors of PiSSA publish: a residual and its initial adapter."""
