"""How a node is asked, where none answers as it should; what a good one answers is in test_remote."""

import socket

import pytest

from sllm_node.cli.asking import ANSWER_S, call, limit_of, reason


def test_a_node_that_says_nothing_is_given_up_with_one_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SystemExit):
            call("GET", "/admin/status", (url, None, None), limit_s=0.02)
    assert f"no answer from {url}/admin/status in 0.02 s" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["load", "unload", "pull", "pin"])
def test_what_takes_as_long_as_a_model_needs_is_waited_for(verb):
    assert limit_of(f"/admin/models/a/{verb}") is None
    assert limit_of(f"/admin/aliases/{verb}/set") == limit_of("/admin/status") == ANSWER_S


def test_what_keeps_the_resolver_or_a_socket_from_a_node_is_told_in_their_words():
    assert reason(socket.gaierror(-2, "Name not known")) == "Name not known"
    assert reason(ConnectionRefusedError(111, "Connect call failed")) == "connection refused"
