import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
WITHOUT = """
import sys
sys.modules["obstore"] = None
from sllm_node.core.config import parse_config
from sllm_node.core.errors import ConfigError
from sllm_node.core.metrics import Metrics
from sllm_node.store.remote import RemoteTier
config = parse_config('[remotes.r]\\nurl = "http://h/p"')
try:
    RemoteTier(config.remotes, config.store, Metrics())
except ConfigError as error:
    print(error)
"""


def test_a_remote_without_the_extra_names_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (
        "remotes.r: remotes need the extra 'remote': pip install 'sllm-node[remote]'" in done.stdout
    )
