"""Residual formats: how the frozen part of a matrix is stored, sharded and decoded."""
