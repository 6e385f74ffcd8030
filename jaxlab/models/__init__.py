"""Models; the only part of jaxlab that imports flax."""
