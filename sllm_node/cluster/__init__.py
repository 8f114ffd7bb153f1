"""Which node serves a request: what nodes tell of themselves, and placement (nothing uses it yet)."""
