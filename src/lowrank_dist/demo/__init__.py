"""The demonstration: a small real model and data set, trained, converted and evaluated with two CPU ranks."""
