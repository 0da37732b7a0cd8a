"""The parts that run under Lightning: the strategy, the module, the optimizer and the Trainer's command line."""
