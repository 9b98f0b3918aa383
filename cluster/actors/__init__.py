"""The actors of a run on Ray."""
