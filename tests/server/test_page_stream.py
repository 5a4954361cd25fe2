"""The page's reader of server-sent events, wherever the network cuts a body in pieces."""

from __future__ import annotations

import pytest
from support.page import run_module

BODIES = {
    "lines end by LF": ("data: é東\n\ndata: b\n\n", ["é東", "b"]),
    "by CRLF": ("data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    "by CR": ("data: a\r\rdata: b\r\r", ["a", "b"]),
    "comments, names and ids": (": ping\n\nevent: x\nid: 3\ndata:a\n\nretry: 1\n\n", ["a"]),
    "several lines of data": ("data: a\ndata:  b\ndata:\n\n", ["a\n b\n"]),
    "no blank line at the end": ("data: a\n\ndata: lost\n", ["a"]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", BODIES)
def test_events_are_the_same_wherever_the_body_is_cut(name):
    text, expected = BODIES[name]
    body = text.encode()
    cuts = [[body[:at].hex(), body[at:].hex()] for at in range(len(body) + 1)]
    cuts.append([body[at : at + 1].hex() for at in range(len(body))])
    for pieces, found in zip(cuts, run_module("stream", cuts), strict=True):
        if text.endswith("\r") and not text.endswith("\n"):  # the last CR may be half of a CRLF: its event waits
            found = [*found, *expected[len(found) :]]
        assert found == expected, pieces
