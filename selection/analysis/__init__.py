"""What do rewards and gradients of many candidates say? Used by the study alone."""
