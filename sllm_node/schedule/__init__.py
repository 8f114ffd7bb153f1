"""Which model is served when: this node's decisions and the shell that carries them out."""
