"""From a Hugging Face checkpoint or a GGUF file to ours, once."""
