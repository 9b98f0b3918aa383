"""The training loop, its observers and its recovery."""
