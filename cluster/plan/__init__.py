"""The plan of a run: its memory, time and cost."""
