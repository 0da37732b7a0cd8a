"""Statistics of the data for methods that look at data, and the pass that measures them."""
