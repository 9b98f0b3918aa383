"""The model families: one adapter each around a diffusers pipeline."""
