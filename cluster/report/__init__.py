"""The report of a run, rendered from its folder alone."""
