"""One code an element."""
