"""The networks that the scorers use."""
