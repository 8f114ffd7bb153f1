"""The composition root: one node made of config, clock, device, store, service and server."""
