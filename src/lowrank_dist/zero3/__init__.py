"""ZeRO-3 partitions, gathers and optimizer state; the only package that uses DeepSpeed's internals."""
