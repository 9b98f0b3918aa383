"""Selection of the candidates to train on and their advantages, by pure functions of rewards."""
