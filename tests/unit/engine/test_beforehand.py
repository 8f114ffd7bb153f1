from sllm_node.engine.beforehand import read_codec, read_token_bytes
from tests.models import make_checkpoint


def test_kv_geometry_is_the_same_with_and_without_the_tokenizer(tmp_path):
    folder = make_checkpoint(tmp_path, "m").path
    assert read_token_bytes(folder) == read_codec(folder)[1] > 0


def test_a_folder_without_a_config_or_with_a_strange_one_tells_nothing(tmp_path):
    assert read_token_bytes(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    assert read_token_bytes(tmp_path) is None
