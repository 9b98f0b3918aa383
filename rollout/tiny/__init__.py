"""The bundled tiny models, the synthetic world they live in, and the script that makes them."""
