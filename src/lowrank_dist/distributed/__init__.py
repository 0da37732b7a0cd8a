"""The ranks that share work, and the arithmetic of shards; knows no model."""
