"""The record of a run: its folder, its checkpoints, its events."""
