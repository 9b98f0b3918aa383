"""Analysis of rewards and gradients of many candidates, used by the study alone."""
