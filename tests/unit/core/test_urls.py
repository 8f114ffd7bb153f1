import pytest

from sllm_node.core.urls import plain, without_urls


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:p@ss@host:1/a?sig=x#y", "https://host:1/a"),
        ("https://host?sig=x", "https://host"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_a_url_is_shown_without_user_and_query(url, shown):
    assert plain(url) == shown


def test_what_is_told_has_no_urls():
    assert without_urls("GET https://user:p@host/a?sig=x in 2 s") == "GET in 2 s"
    assert without_urls("no url: a/b at 10:30") == "no url: a/b at 10:30"
