"""Our loader inside other people's programs: what sllm_node.torch and sllm_node.transformers are made of."""
