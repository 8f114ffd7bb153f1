"""Lossless codecs for chunks of weights: every chunk decodes by itself, bit for bit."""
