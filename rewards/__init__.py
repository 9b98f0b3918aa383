"""Stage 1: images become rewards; a failed reward is missing, never zero."""
