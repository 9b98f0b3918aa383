"""Which arm learns fastest at what cost, and what drives reward and gradient."""
