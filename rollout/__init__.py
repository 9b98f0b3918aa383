"""Stage 0: prompts and noise become candidate trajectories and images."""
