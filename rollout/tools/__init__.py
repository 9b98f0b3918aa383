"""Tools around a model: files for diffusers, costs, random weights."""
