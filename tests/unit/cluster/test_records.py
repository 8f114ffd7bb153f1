import pytest

from sllm_node.cluster.records import Alias, Desired, Drop, Pin, Put, Records, Registration, check
from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import ModelId

M = ModelId("m")


def test_a_change_leaves_the_records_before_it_as_they_were():
    before = Records().after(Put(Pin(M)))
    after = before.after(Drop(Pin, "m")).after(Put(Alias("latest", M)))
    assert (dict(before.pins), dict(before.aliases)) == ({"m": Pin(M)}, {})
    assert (dict(after.pins), dict(after.aliases)) == ({}, {"latest": Alias("latest", M)})


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (Pin(ModelId("../x")), "model"),
        (Alias("a b", M), "alias"),
        (Registration(M, "s3://bucket/with space"), "url"),
        (Registration(M, "s3://" + "x" * 3000), "url"),
        (Registration(M, "ftp://host/path"), "url"),
        (Registration(M, "https://user:PASSWORD@host/path"), "url"),
        (Registration(M, "https://host/path?sig=TOKEN"), "url"),
        (Registration(M, "https://host?sig=TOKEN"), "url"),
        (Registration(M, "https://host/path#TOKEN"), "url"),
        (Desired(M, 0, 1_000_000), "minimum"),
        (Desired(M, 0, 1, float("inf")), "keep_alive_s"),
    ],
)
def test_a_refusal_names_the_field(record, field):
    with pytest.raises(InvalidRequestError) as told:
        check(record)
    assert told.value.param == field
    assert not [
        word for word in ("PASSWORD", "TOKEN") if word in str(told.value)
    ]  # it is logged, too


@pytest.mark.parametrize("url", ["s3://bucket", "https://host:8443/a/b@c", "http://[::1]:80/x"])
def test_an_address_of_a_remote_may_have_host_port_and_path(url):
    check(Registration(M, url))
