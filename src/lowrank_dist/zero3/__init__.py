"""The only package that names DeepSpeed's internals."""
