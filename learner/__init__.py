"""Stage 3: updates of the policy on the selected trajectories."""
