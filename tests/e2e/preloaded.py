"""What the fork server imports, once for all nodes of the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import sllm_node.cli.main
import sllm_node.node.node  # noqa: F401
