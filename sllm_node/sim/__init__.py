"""A cluster in simulated time: the same decisions as on real nodes, and others to compare them with."""
