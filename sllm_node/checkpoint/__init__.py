"""What lies on disk: the loading-optimised format, its index and its catalogue. No torch."""
