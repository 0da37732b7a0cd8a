"""The demonstration: a small real model is trained on real data with two CPU ranks, converted and evaluated."""
