"""The suite that shows in minutes what works on a GPU, how fast, and what limits it."""
