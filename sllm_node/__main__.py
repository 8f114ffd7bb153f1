"""Run with `python -m sllm_node`; also the entry point `sllm-node`."""

from sllm_node.cli.main import main

if __name__ == "__main__":
    main()
