"""Selection: which candidates the learner sees, and with which advantages; pure functions of rewards."""
