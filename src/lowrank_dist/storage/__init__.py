"""Bytes on disk: checkpoints read by rows and written in place, without mathematics."""
