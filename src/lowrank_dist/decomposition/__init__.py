"""One pass over all matrices of a model."""
