import pytest

from sllm_node.core.names import is_model_name


@pytest.mark.parametrize("name", ["a", "Qwen3-8B", "org:name", "m.1_2", "x" * 96])
def test_usual_names_are_allowed(name):
    assert is_model_name(name)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "ä", "x" * 97, "a\n", ".."])
def test_names_that_are_no_plain_folder_names_are_not(name):
    assert not is_model_name(name)
