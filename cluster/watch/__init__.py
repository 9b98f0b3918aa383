"""The progress of a run in a terminal."""
