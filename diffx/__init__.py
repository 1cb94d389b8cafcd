"""diffx: train, adapt, evaluate and quantize models with differential attention."""

__version__ = "0.1.0"
