"""A serving appliance for many LLMs on few GPUs."""

__version__ = "0.1.0"
