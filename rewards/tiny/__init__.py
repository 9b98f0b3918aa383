"""The bundled world's own reward model, and the code that trains it."""
