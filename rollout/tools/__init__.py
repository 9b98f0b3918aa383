"""What else can be made of a model: files for diffusers, costs, random weights."""
