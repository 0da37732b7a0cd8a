"""Lightning: the strategy, the module, the optimizer, the command line of its Trainer."""
