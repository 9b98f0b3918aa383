"""The bundled tiny models, their synthetic world, and the script that pretrains them."""
