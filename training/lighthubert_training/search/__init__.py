"""The search for the best subnet within a budget."""
