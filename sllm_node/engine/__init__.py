"""Turns tokens into tokens: the step loop over transformers models."""
