"""The bundled world's own reward model, and how it is made."""
