"""The accelerator behind one small protocol: memory, streams, events. No models."""
