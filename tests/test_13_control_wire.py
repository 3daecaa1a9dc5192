"""Section 13: JSON-RPC lines, taken apart and put together."""
import json
import random

import pytest

import claudomator as c


def fed(splitter, *pieces):
    return [line if isinstance(line, bytes) else "too long" for piece in pieces for line in splitter.feed(piece)]


STREAM = b'{"a":1}\n\n  \r\n{"b":"x\xc3\xa9"}\r\nabcdefghijklmnopqrstuvwxyz\n{"c":3}\nrest'
LINES = [b'{"a":1}', b'{"b":"x\xc3\xa9"}\r', "too long", b'{"c":3}']


def test_lines_come_out_the_same_whatever_the_split():
    for cut in range(len(STREAM) + 1):
        assert fed(c.RequestSplitter(limit=20), STREAM[:cut], STREAM[cut:]) == LINES
    assert fed(c.RequestSplitter(limit=20), *(STREAM[at:at + 1] for at in range(len(STREAM)))) == LINES


def test_a_line_of_exactly_the_limit_passes_and_one_byte_more_does_not():
    assert fed(c.RequestSplitter(limit=5), b"12345\n123456\n12345\n") == [b"12345", "too long", b"12345"]


def test_an_endless_line_is_reported_once_and_not_kept():
    splitter = c.RequestSplitter(limit=1000)
    found = [line for _ in range(500) for line in splitter.feed(b"x" * 999)]
    assert [str(error) for error in found] == ["a request line may have 1000 bytes at most"]
    assert len(splitter._buffer) == 0
    assert fed(splitter, b"tail\n{}\n") == [b"{}"]


def test_a_request_has_a_method_params_and_an_id():
    assert c.parse_request(b'{"jsonrpc":"2.0","id":7,"method":"a.b","params":{"x":[1]}}') == c.Request("a.b", {"x": [1]}, 7)
    assert c.parse_request(b'{"jsonrpc":"2.0","method":"a.b"}') == c.Request("a.b", {}, None)
    assert c.parse_request(b' {"jsonrpc":"2.0","id":"s","method":""}\r').id == "s"


@pytest.mark.parametrize("line, number, request_id", [
    (b"garbage", c.PARSE_ERROR, None),
    (b"\xff\xfe", c.PARSE_ERROR, None),
    (b'{"jsonrpc":"2.0","id":1,"method":"m"} x', c.PARSE_ERROR, None),
    (b'{"jsonrpc":"2.0","id":NaN,"method":"m"}', c.PARSE_ERROR, None),
    (b'{"id":' + b"9" * 5000 + b"}", c.PARSE_ERROR, None),
    (b"[" * 100_000, c.PARSE_ERROR, None),
    (b"[]", c.INVALID_REQUEST, None),
    (b'[{"jsonrpc":"2.0","id":1,"method":"m"}]', c.INVALID_REQUEST, None),
    (b'"text"', c.INVALID_REQUEST, None),
    (b'{"jsonrpc":"2.0","id":{},"method":"m"}', c.INVALID_REQUEST, None),
    (b'{"jsonrpc":"2.0","id":true,"method":"m"}', c.INVALID_REQUEST, None),
    (b'{"id":1,"method":"m"}', c.INVALID_REQUEST, 1),
    (b'{"jsonrpc":2.0,"id":1,"method":"m"}', c.INVALID_REQUEST, 1),
    (b'{"jsonrpc":"2.0","id":"a","method":5}', c.INVALID_REQUEST, "a"),
    (b'{"jsonrpc":"2.0","id":3}', c.INVALID_REQUEST, 3),
    (b'{"jsonrpc":"2.0","id":4,"method":"m","params":[1]}', c.INVALID_PARAMS, 4),
    (b'{"jsonrpc":"2.0","id":4,"method":"m","params":null}', c.INVALID_PARAMS, 4),
])
def test_what_is_no_request_is_refused_with_the_number_of_the_specification(line, number, request_id):
    with pytest.raises(c.WireError) as caught:
        c.parse_request(line)
    assert (caught.value.number, caught.value.request_id) == (number, request_id)
    answer = json.loads(c.encode_error(caught.value.request_id, caught.value))
    assert answer["error"]["code"] == number and answer["id"] == request_id
    assert answer["error"]["data"] == {"code": "protocol", "exit_code": 2}


def test_mutated_requests_are_read_or_refused_and_nothing_else():
    rng, good = random.Random(11), b'{"jsonrpc":"2.0","id":12,"method":"task.get","params":{"id":"ab\\u00e9\\ud83d"}}'
    for _ in range(3000):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]":,\\u0129nt\xff\x00 ')
        try:
            assert isinstance(c.parse_request(bytes(line)), c.Request)
        except c.WireError:
            pass


def test_answers_and_notifications_are_one_ascii_line_each():
    for line in (c.encode_result(1, {"text": "é\n\u2028"}), c.encode_notification("events.watch", {"item": "ü\r\n"}),
                 c.encode_error(2, c.NotFound("kein Täsk\n"))):
        assert line.isascii() and line.count(b"\n") == 1 and line.endswith(b"\n")
        assert json.loads(line)["jsonrpc"] == "2.0"


@pytest.mark.parametrize("error, number", [
    (c.InvalidInput("bad", ["a: b"]), c.APPLICATION_ERROR), (c.WrongState("no", state="READY"), c.APPLICATION_ERROR),
    (c.WireError(c.METHOD_NOT_FOUND, "no method"), c.METHOD_NOT_FOUND), (KeyError("x"), c.INTERNAL_ERROR)])
def test_an_error_arrives_as_it_was_raised(error, number):
    body = json.loads(c.encode_error(5, error))["error"]
    arrived = c.error_from_wire(body)
    assert body["code"] == number and str(arrived) == str(error)
    assert arrived.code == getattr(error, "code", "internal") and arrived.exit_code == getattr(error, "exit_code", 1)
    for name, value in getattr(error, "data", {}).items():
        assert arrived.data[name] == value


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": {"exit_code": "x"}, "message": 5}, {"code": 1}])
def test_a_strange_error_answer_is_still_an_error(body):
    arrived = c.error_from_wire(body)
    assert isinstance(arrived, c.ClaudomatorError) and arrived.exit_code == 1 and str(arrived)
