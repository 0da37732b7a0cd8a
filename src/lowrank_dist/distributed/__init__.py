"""Shard groups, their collectives, and the arithmetic of shards; independent of any model."""
