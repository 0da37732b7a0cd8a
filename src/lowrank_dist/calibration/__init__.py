"""What methods that look at data see of them."""
