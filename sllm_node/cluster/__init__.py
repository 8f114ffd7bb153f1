"""The other nodes: who is alive, what they tell of themselves, and which node serves a request."""
