"""The steps from the user's options to a sharded, trainable model."""
