"""Measures loading beside the loaders that others use, with the ceilings of the same run."""
