"""PEFT's tuners on a frozen, sharded base: adapters that are not made from the weights. Private."""
