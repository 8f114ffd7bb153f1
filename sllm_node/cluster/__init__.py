"""Other nodes: what they tell of themselves, and which node serves a request."""
