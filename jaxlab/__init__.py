"""jaxlab: train language models in JAX, on one device or many.

Nothing is imported here, so that `import jaxlab` costs nothing; import the part
that you need (`jaxlab.config`, `jaxlab.data`, ...).
"""

__version__ = "0.1.0"
