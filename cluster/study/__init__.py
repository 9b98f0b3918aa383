"""The study of selection: speed and cost of its arms, and the variance of reward and gradient."""
