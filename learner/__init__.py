"""Stage 3: selected trajectories become a better policy."""
