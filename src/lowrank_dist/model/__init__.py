"""From a configuration and the headers of a checkpoint to a plan of what is read and decomposed."""
