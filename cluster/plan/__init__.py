"""How long a run takes, what it needs and what it costs, before anything is held."""
