"""Section 14: which bytes are a request, which are refused with what, and what an answer looks like.

Every input of the tables is fed whole, byte by byte, and with other bytes after it.  h11 reads the same bytes as an
oracle: what is accepted here means the same there, and what is stricter here is listed in docs/http.md.
"""
import email.utils
import pathlib
import random

import pytest

import claudomator as c

HOST = b"Host: localhost\r\n"


def get(line=b"GET / HTTP/1.1", *fields, host=HOST, body=b""):
    return line + b"\r\n" + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def post(*fields, body=b"", line=b"POST /x HTTP/1.1"):
    return get(line, *fields, body=body)


def outcomes(pieces):
    """The requests that the pieces hold, and at the end the status of the refusal if there was one."""
    decoder, found = c.RequestDecoder(), []
    for piece in pieces:
        decoder.feed(piece)
        try:
            while (request := decoder.take()) is not None:
                found.append(request)
        except c.HttpError as error:
            return [*found, error.http_status]
    return found


def every_way(data, after=b""):
    """The outcomes of ``data``, the same whole and byte by byte."""
    whole = outcomes([data + after])
    assert outcomes([data[at:at + 1] for at in range(len(data))] + [after]) == whole
    return whole


def one(data):
    """The only request in ``data``, which also stands before other requests and after them."""
    found = every_way(data)
    assert len(found) == 1 and isinstance(found[0], c.HttpRequest), found
    other = get(b"GET /other HTTP/1.1")
    assert every_way(data, other)[0] == found[0] and every_way(data, other)[1].path == "/other"
    assert every_way(other + data)[1] == found[0]
    assert every_way(b"\r\n" + data) == found, "one empty line before a request is ignored"
    assert every_way(data[:-1]) == [], "a request that lacks its last byte needs more"
    return found[0]


CHUNKED = b"Transfer-Encoding: chunked"
ACCEPTED = {
    "the simplest": (get(), dict(method="GET", target="/", path="/", query=[], minor=1, host="localhost", body=b"", keep_alive=True,
                                 headers={"host": "localhost"})),
    "a query": (get(b"GET /a/b?x=1&y=%C3%A4+b&x=&z HTTP/1.1"),
                dict(path="/a/b", query=[("x", "1"), ("y", "ä b"), ("x", ""), ("z", "")], target="/a/b?x=1&y=%C3%A4+b&x=&z")),
    "an encoded path": (get(b"GET /a%20b/%c3%A4/+%2B;v=1 HTTP/1.1"), dict(path="/a b/ä/++;v=1")),
    "an empty query": (get(b"GET /? HTTP/1.1"), dict(path="/", query=[])),
    "a query with ? and /": (get(b"GET /?a?/=b/?&&c==d HTTP/1.1"), dict(query=[("a?/", "b/?"), ("c", "=d")])),
    "two slashes": (get(b"GET //a//b HTTP/1.1"), dict(path="//a//b")),
    "three dots": (get(b"GET /.../a..b/.c HTTP/1.1"), dict(path="/.../a..b/.c")),
    "absolute-form": (get(b"GET http://Other.example:80/p?q HTTP/1.1"), dict(path="/p", query=[("q", "")], host="Other.example:80")),
    "absolute-form without a path": (get(b"GET HTTP://[::1] HTTP/1.1"), dict(path="/", host="[::1]")),
    "absolute-form with a query only": (get(b"GET http://a?b=c HTTP/1.1"), dict(path="/", query=[("b", "c")], host="a")),
    "another method": (get(b"M-SEARCH!# /x HTTP/1.1"), dict(method="M-SEARCH!#")),
    "HTTP/1.0": (get(b"GET / HTTP/1.0", host=b""), dict(minor=0, host="", keep_alive=False)),
    "HTTP/1.0 that goes on": (get(b"GET / HTTP/1.0", b"Connection: Keep-Alive"), dict(minor=0, keep_alive=True, host="localhost")),
    "close": (get(b"GET / HTTP/1.1", b"Connection: foo, CLOSE"), dict(keep_alive=False)),
    "close wins": (get(b"GET / HTTP/1.0", b"Connection: close, keep-alive"), dict(keep_alive=False)),
    "connection twice": (get(b"GET / HTTP/1.1", b"Connection: upgrade", b"Connection: close"),
                         dict(keep_alive=False, headers={"host": "localhost", "connection": "upgrade, close"})),
    "repeated fields": (get(b"GET / HTTP/1.1", b"X-a: 1", b"x-A:2", b"X-A:"), dict(headers={"host": "localhost", "x-a": "1, 2, "})),
    "spaces round a value": (get(b"GET / HTTP/1.1", b"A: \t b c \t"), dict(headers={"host": "localhost", "a": "b c"})),
    "bytes beyond ASCII": (get(b"GET / HTTP/1.1", b"A: \xe4\xff"), dict(headers={"host": "localhost", "a": "\xe4\xff"})),
    "every token character": (get(b"GET / HTTP/1.1", b"!#$%&'*+-.^_`|~09azAZ: v"), dict(method="GET")),
    "a host with a port": (get(host=b"Host: [::1]:8484\r\n"), dict(host="[::1]:8484")),
    "as many fields as allowed": (get(b"GET / HTTP/1.1", *[b"a: b"] * (c.MAX_FIELDS - 1)), dict(method="GET")),
    "the longest target": (get(b"GET /" + b"a" * (c.MAX_TARGET_BYTES - 1) + b" HTTP/1.1"), dict(method="GET")),
    "the longest head": (get(b"GET / HTTP/1.1", b"A: " + b"a" * (c.MAX_HEAD_BYTES - len(get()) - 5)), dict(method="GET")),
    "a body": (post(b"Content-Length: 5", body=b"a\r\nb\0"), dict(body=b"a\r\nb\0", method="POST")),
    "an empty body": (post(b"content-length:0"), dict(body=b"")),
    "a length with zeros": (post(b"Content-Length: 0003", body=b"abc"), dict(body=b"abc")),
    "a body of GET": (get(b"GET / HTTP/1.1", b"Content-Length: 1", body=b"x"), dict(body=b"x")),
    "chunks": (post(CHUNKED, body=b"3\r\nabc\r\n00A;x=\"y\"\r\n0123456789\r\n0\r\n\r\n"), dict(body=b"abc0123456789")),
    "no chunks": (post(b"transfer-encoding:Chunked ", body=b"000\r\n\r\n"), dict(body=b"")),
    "trailers": (post(CHUNKED, body=b"1\r\nx\r\n0;a\r\nA: b\r\nHost: no\r\n\r\n"), dict(body=b"x", headers={
        "host": "localhost", "transfer-encoding": "chunked"})),
    "expect": (post(b"Expect: 100-Continue", b"Content-Length: 1", body=b"x"), dict(body=b"x")),
}

REFUSED = {
    "nothing": (b"\r\n\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "two spaces": (get(b"GET  / HTTP/1.1"), 400),
    "a space at the end": (get(b"GET / HTTP/1.1 "), 400),
    "a tab": (get(b"GET\t/ HTTP/1.1"), 400),
    "a space in the target": (get(b"GET /a b HTTP/1.1"), 400),
    "no method": (get(b" / HTTP/1.1"), 400),
    "a bad method": (get(b"G@T / HTTP/1.1"), 400),
    "an empty target": (get(b"GET  HTTP/1.1"), 400),
    "asterisk-form": (get(b"OPTIONS * HTTP/1.1"), 400),
    "authority-form": (get(b"CONNECT localhost:80 HTTP/1.1"), 400),
    "another scheme": (get(b"GET ftp://a/ HTTP/1.1"), 400),
    "a URL without a host": (get(b"GET http:///x HTTP/1.1"), 400),
    "a URL with a user": (get(b"GET http://u@localhost/ HTTP/1.1"), 400),
    "a fragment": (get(b"GET /a#b HTTP/1.1"), 400),
    "a quote": (get(b'GET /a"b HTTP/1.1'), 400),
    "a backslash": (get(b"GET /a\\b HTTP/1.1"), 400),
    "a bracket": (get(b"GET /a[0] HTTP/1.1"), 400),
    "a bracket in the query": (get(b"GET /?a] HTTP/1.1"), 400),
    "a bracket in a URL's path": (get(b"GET http://localhost/[ HTTP/1.1"), 400),
    "beyond ASCII in the target": (get(b"GET /\xc3\xa4 HTTP/1.1"), 400),
    "beyond ASCII in the query": (get(b"GET /?\xc3\xa4 HTTP/1.1"), 400),
    "a fragment in the query": (get(b"GET /?a#b HTTP/1.1"), 400),
    "NUL in the target": (get(b"GET /a%00 HTTP/1.1"), 400),
    "a line feed in the query": (get(b"GET /?a%0ab HTTP/1.1"), 400),
    "DEL in the path": (get(b"GET /%7f HTTP/1.1"), 400),
    "half a percent": (get(b"GET /a%2 HTTP/1.1"), 400),
    "no hexadecimal": (get(b"GET /a%+1 HTTP/1.1"), 400),
    "half a character": (get(b"GET /a%C3 HTTP/1.1"), 400),
    "an overlong character": (get(b"GET /%c0%ae%c0%ae HTTP/1.1"), 400),
    "dots": (get(b"GET /a/../b HTTP/1.1"), 400),
    "dots at the end": (get(b"GET /.. HTTP/1.1"), 400),
    "one dot": (get(b"GET /./a HTTP/1.1"), 400),
    "encoded dots": (get(b"GET /a/%2e%2E/b HTTP/1.1"), 400),
    "half encoded dots": (get(b"GET /.%2e HTTP/1.1"), 400),
    "an encoded slash": (get(b"GET /a%2fb HTTP/1.1"), 400),
    "an encoded backslash": (get(b"GET /a%5cb HTTP/1.1"), 400),
    "dots in a URL": (get(b"GET http://localhost/../x HTTP/1.1"), 400),
    "HTTP/2.0": (get(b"GET / HTTP/2.0"), 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (get(b"GET / HTTP/1.2"), 505),
    "HTTP/0.9": (get(b"GET / HTTP/0.9"), 505),
    "a lower-case version": (get(b"GET / http/1.1"), 400),
    "a long version": (get(b"GET / HTTP/1.10"), 400),
    "a version with another digit": (get("GET / HTTP/1.\u0661".encode()), 400),
    "no dot in the version": (get(b"GET / HTTP/1,1"), 400),
    "no host": (get(host=b""), 400),
    "two hosts": (get(host=HOST * 2), 400),
    "an empty host": (get(host=b"Host:\r\n"), 400),
    "a host with a space": (get(host=b"Host: a b\r\n"), 400),
    "a host with a comma": (get(host=b"Host: a,b\r\n"), 400),
    "a host with a path": (get(host=b"Host: a/b\r\n"), 400),
    "a host with a user": (get(host=b"Host: u@a\r\n"), 400),
    "a host with a bad port": (get(host=b"Host: a:8x\r\n"), 400),
    "a host with two ports": (get(host=b"Host: a:8:9\r\n"), 400),
    "a host with an open bracket": (get(host=b"Host: [::1\r\n"), 400),
    "a host with text after the bracket": (get(host=b"Host: [::1]a\r\n"), 400),
    "empty brackets": (get(host=b"Host: []\r\n"), 400),
    "a bad host of HTTP/1.0": (get(b"GET / HTTP/1.0", host=b"Host: a b\r\n"), 400),
    "a space before the colon": (get(b"GET / HTTP/1.1", b"A : b"), 400),
    "a tab before the colon": (get(b"GET / HTTP/1.1", b"A\t: b"), 400),
    "a line without a colon": (get(b"GET / HTTP/1.1", b"A"), 400),
    "an empty name": (get(b"GET / HTTP/1.1", b": b"), 400),
    "a name in brackets": (get(b"GET / HTTP/1.1", b"(A): b"), 400),
    "a name beyond ASCII": (get(b"GET / HTTP/1.1", b"\xe4: b"), 400),
    "a fold": (get(b"GET / HTTP/1.1", b"A: b", b" c"), 400),
    "a fold by a tab": (get(b"GET / HTTP/1.1", b"A: b", b"\tc: d"), 400),
    "a fold of the request line": (b"GET / HTTP/1.1\r\n A: b\r\n" + HOST + b"\r\n", 400),
    "a bare LF": (b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
    "a bare LF in a value": (get(b"GET / HTTP/1.1", b"A: b\nC: d"), 400),
    "a bare CR in a value": (get(b"GET / HTTP/1.1", b"A: b\rC: d"), 400),
    "a CR before the end": (get(b"GET / HTTP/1.1", b"A: b\r"), 400),
    "NUL in a value": (get(b"GET / HTTP/1.1", b"A: b\0"), 400),
    "DEL in a value": (get(b"GET / HTTP/1.1", b"A: \x7f"), 400),
    "a vertical tab in a value": (get(b"GET / HTTP/1.1", b"A: b\vc"), 400),
    "two lengths": (post(b"Content-Length: 1", b"Content-Length: 2", body=b"ab"), 400),
    "two equal lengths": (post(b"Content-Length: 1", b"Content-Length: 1", body=b"a"), 400),
    "a list of lengths": (post(b"Content-Length: 1, 1", body=b"a"), 400),
    "a length with a sign": (post(b"Content-Length: +1", body=b"a"), 400),
    "a negative length": (post(b"Content-Length: -1", body=b"a"), 400),
    "an underscore in the length": (post(b"Content-Length: 1_0", body=b"a" * 10), 400),
    "a hexadecimal length": (post(b"Content-Length: 0x1", body=b"a"), 400),
    "another script's digit": (post(b"Content-Length: \xb2", body=b"ab"), 400),
    "an empty length": (post(b"Content-Length:"), 400),
    "a length that is too large": (post(b"Content-Length: %d" % (c.MAX_BODY_BYTES + 1)), 413),
    "a length beyond all measure": (post(b"Content-Length: " + b"9" * 5000), 413),
    "coding and length": (post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"), 400),
    "length and coding": (post(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"), 400),
    "a coding in HTTP/1.0": (post(CHUNKED, body=b"0\r\n\r\n", line=b"POST / HTTP/1.0"), 400),
    "another coding": (post(b"Transfer-Encoding: gzip, chunked"), 501),
    "not chunked at last": (post(b"Transfer-Encoding: chunked, gzip"), 400),
    "not chunked at all": (post(b"Transfer-Encoding: identity"), 400),
    "chunked twice": (post(b"Transfer-Encoding: chunked, chunked"), 400),
    "two fields of codings": (post(CHUNKED, CHUNKED), 400),
    "a coding that looks like chunked": (post(b"Transfer-Encoding: xchunked"), 400),
    "a coding with a vertical tab": (post(b"Transfer-Encoding: \vchunked"), 400),
    "an empty coding": (post(b"Transfer-Encoding: chunked,", body=b"0\r\n\r\n"), 400),
    "no coding": (post(b"Transfer-Encoding:"), 400),
    "a chunk without a size": (post(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk with a bad size": (post(CHUNKED, body=b"3x\r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk with a prefix": (post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk with a sign": (post(CHUNKED, body=b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "a space after the size": (post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "a chunk that is longer than it says": (post(CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"), 400),
    "a chunk that ends with an LF": (post(CHUNKED, body=b"3\r\nabc\n0\r\n\r\n"), 400),
    "a size that ends with an LF": (post(CHUNKED, body=b"3\nabc\r\n0\r\n\r\n"), 400),
    "a bare CR in an extension": (post(CHUNKED, body=b"3;a\rb\r\nabc\r\n0\r\n\r\n"), 400),
    "a long extension": (post(CHUNKED, body=b"3;" + b"a" * c.MAX_CHUNK_LINE + b"\r\nabc\r\n0\r\n\r\n"), 400),
    "a size of many digits": (post(CHUNKED, body=b"000000003\r\nabc\r\n0\r\n\r\n"), 413),
    "a chunk that is too large": (post(CHUNKED, body=b"%x\r\n" % (c.MAX_BODY_BYTES + 1)), 413),
    "chunks that are too large together": (post(CHUNKED, body=b"1\r\na\r\n%x\r\n" % c.MAX_BODY_BYTES), 413),
    "a bad trailer": (post(CHUNKED, body=b"0\r\nA : b\r\n\r\n"), 400),
    "trailers without end": (post(CHUNKED, body=b"0\r\n" + b"A: bbbbbbb\r\n" * (c.MAX_HEAD_BYTES // 12 + 2)), 400),
    "another expectation": (post(b"Expect: 200-ok", b"Content-Length: 1", body=b"a"), 417),
    "credentials twice": (get(b"GET / HTTP/1.1", b"Authorization: a", b"authorization: b"), 400),
    "origin twice": (get(b"GET / HTTP/1.1", b"Origin: a", b"Origin: b"), 400),
    "too many fields": (get(b"GET / HTTP/1.1", *[b"a: b"] * c.MAX_FIELDS), 431),
    "a target that is too long": (get(b"GET /" + b"a" * c.MAX_TARGET_BYTES + b" HTTP/1.1"), 414),
    "a target without end": (b"GET /" + b"a" * c.MAX_HEAD_BYTES, 414),
    "a head that is too long": (get(b"GET / HTTP/1.1", b"A: " + b"a" * (c.MAX_HEAD_BYTES - len(get()) - 4)), 431),
    "a head without end": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (c.MAX_HEAD_BYTES // 6), 431),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_request_is_read_the_same_however_it_comes(case):
    data, expected = ACCEPTED[case]
    found = one(data)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("case", REFUSED)
def test_request_is_refused_with_its_status_however_it_comes(case):
    data, status = REFUSED[case]
    assert every_way(data) == [status] == every_way(data, get())
    assert every_way(get() + data)[1:] == [status], "also after another one"
    assert status in c.HTTP_REASONS


def test_the_largest_body_is_read_with_a_length_and_in_chunks():
    size = c.MAX_BODY_BYTES
    for request in (post(b"Content-Length: %d" % size, body=b"x" * size), post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size))):
        found = outcomes([request[at:at + (1 << 16)] for at in range(0, len(request), 1 << 16)])
        assert len(found) == 1 and found[0].body == b"x" * size


@pytest.mark.slow
def test_pipelined_requests_come_in_their_order_at_every_split():
    stream = b"".join(data for data, _ in ACCEPTED.values() if len(data) < 500)
    whole = outcomes([stream])
    assert len(whole) == sum(len(data) < 500 for data, _ in ACCEPTED.values())
    for at in range(len(stream)):
        assert outcomes([stream[:at], stream[at:]]) == whole


def test_wanted_never_reaches_beyond_the_request_and_gets_there_in_few_steps():
    rng = random.Random(14)
    for case, (data, _) in ACCEPTED.items():
        head = data.index(b"\r\n\r\n") + 4
        decoder, at = c.RequestDecoder(), head
        decoder.feed(data[:head])
        while (request := decoder.take()) is None:
            assert 1 <= decoder.wanted <= len(data) - at, case
            step = rng.randint(1, decoder.wanted)
            decoder.feed(data[at:at + step])
            at += step
        assert at == len(data) and request == outcomes([data])[0], case
    decoder, body, reads = c.RequestDecoder(), b"10000\r\n" + b"x" * 65536 + b"\r\n0\r\n\r\n", 0
    decoder.feed(post(CHUNKED))
    while decoder.take() is None:
        piece, body, reads = body[:decoder.wanted], body[decoder.wanted:], reads + 1
        decoder.feed(piece)
    assert body == b"" and reads < 10


def test_a_client_that_expects_to_be_told_to_continue_is_known_until_it_sends():
    fields = b"Expect: 100-continue", b"Content-Length: 2"
    decoder = c.RequestDecoder()
    assert not decoder.expects_continue
    decoder.feed(post(*fields))
    assert decoder.take() is None and decoder.expects_continue
    decoder.feed(b"a")
    assert decoder.take() is None and not decoder.expects_continue
    decoder.feed(b"b")
    assert decoder.take().body == b"ab" and not decoder.expects_continue
    for other in (post(*fields, body=b"a"), post(*fields, line=b"POST / HTTP/1.0"), post(fields[1]), post(CHUNKED)):
        decoder = c.RequestDecoder()
        decoder.feed(other)
        assert decoder.take() is None and not decoder.expects_continue
    decoder = c.RequestDecoder()
    decoder.feed(post(fields[0], CHUNKED))
    assert decoder.take() is None and decoder.expects_continue


def test_decoding_takes_linear_time_byte_by_byte():
    """16 KB one byte at a time look at few bytes twice: seconds if the search began anew each time."""
    decoder, looked = c.RequestDecoder(), []

    class Counting(bytearray):
        def find(self, what, start=0, *end):
            looked.append(len(self) - start)
            return super().find(what, start, *end)
    decoder._buffer = Counting()
    for at in range(8000):
        decoder.feed(b"a")
        decoder.take()
    assert sum(looked) < 8000 * 10


# h11 as an oracle

def ours(data):
    """("request", method, target, fields, body), "more", or ("refused", message)."""
    decoder = c.RequestDecoder()
    decoder.feed(data)
    try:
        request = decoder.take()
    except c.HttpError as error:
        return "refused", str(error)
    if request is None:
        return "more"
    fields = {name: value.lower() if name == "transfer-encoding" else value for name, value in request.headers.items()}  # as h11
    return "request", request.method, request.target, fields, request.body


def theirs(data):
    """The same of h11, refusals without a message."""
    h11 = pytest.importorskip("h11", reason="h11 is in the optional dependencies `test`")
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=c.MAX_HEAD_BYTES)
    connection.receive_data(data)
    request, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                return "more"
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
    except h11.RemoteProtocolError:
        return ("refused",)
    fields = {}
    for name, value in request.headers:
        name, value = name.decode(), value.decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return "request", request.method.decode(), request.target.decode(), fields, body


# What h11 takes and we refuse, by words of our refusal; and the other way round.  docs/http.md gives the reasons.
STRICTER = {
    "a bare LF as a line's end": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", "no line's end"),
    "control characters in a value": (get(b"GET / HTTP/1.1", b"A: b\x01c"), "no line's end"),
    "folded lines": (get(b"GET / HTTP/1.1", b"A: b", b" c"), "or a fold"),
    "characters that no URI may hold": (get(b'GET /a"<>\\^`{|}#b HTTP/1.1'), "no URI may hold"),
    "dot segments, encoded slashes and backslashes": (get(b"GET /../a HTTP/1.1"), "must not hold . or .."),
    "percent signs that encode nothing": (get(b"GET /%zz HTTP/1.1"), "two hexadecimal digits"),
    "encoded control characters": (get(b"GET /%0d%0a HTTP/1.1"), "not even encoded ones"),
    "asterisk-form and authority-form": (get(b"OPTIONS * HTTP/1.1"), "a path or an http URL"),
    "other versions": (get(b"GET / HTTP/3.1"), "only HTTP/1.1 and HTTP/1.0"),
    "hosts that are none": (get(host=b"Host: a b\r\n"), "the Host field must be"),
    "equal lengths, repeated": (post(b"Content-Length: 1", b"Content-Length: 1", body=b"a"), "content-length may stand"),
    "lists of lengths": (post(b"Content-Length: 1, 1", body=b"a"), "Content-Length must be"),
    "credentials and the like, repeated": (get(b"GET / HTTP/1.1", b"Origin: a", b"Origin: b"), "may stand in a request only once"),
    "Transfer-Encoding with Content-Length": (post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"), "must not come with"),
    "Transfer-Encoding in HTTP/1.0": (post(CHUNKED, body=b"0\r\n\r\n", line=b"POST / HTTP/1.0"), "nor in HTTP/1.0"),
    "spaces after a chunk's size": (post(CHUNKED, body=b"1 \r\na\r\n0\r\n\r\n"), "a chunk must begin with its size"),
    "chunk sizes of more than eight digits": (post(CHUNKED, body=b"000000001\r\na\r\n0\r\n\r\n"), "a request's body may have"),
    "long chunk extensions": (post(CHUNKED, body=b"1;" + b"a" * 300 + b"\r\na\r\n0\r\n\r\n"), "between the chunks of the body is too long"),
    "control characters in chunk extensions": (post(CHUNKED, body=b"1;\x01\r\na\r\n0\r\n\r\n"), "between the chunks of the body holds"),
    "other expectations": (get(b"GET / HTTP/1.1", b"Expect: x"), "the only expectation"),
    "more than 100 fields": (get(b"GET / HTTP/1.1", *[b"a: b"] * 101), "fields at most"),
    "targets of more than 8000 bytes": (get(b"GET /" + b"a" * 8000 + b" HTTP/1.1"), "a target may have"),
    "bodies of more than 8 MiB": (post(b"Content-Length: 8388609", body=b"x" * 8388609), "a request's body may have"),
}


@pytest.mark.parametrize("case", STRICTER)
def test_what_is_stricter_than_h11_is_so_and_is_documented(case):
    data, words = STRICTER[case]
    assert theirs(data)[0] == "request"
    assert ours(data)[0] == "refused" and words in ours(data)[1]
    page = pathlib.Path(__file__).parent.parent / "docs" / "http.md"
    assert f"| {case} |" in page.read_text(encoding="utf-8")


def test_an_empty_line_before_the_request_is_taken_here_and_refused_by_h11():
    assert theirs(b"\r\n" + get()) == ("refused",) and ours(b"\r\n" + get()) == ours(get())


def generated(rng):
    """A sound request."""
    word = lambda letters, most: "".join(rng.choice(letters) for _ in range(rng.randint(1, most)))
    fields = [f"{word('abXY-_!~', 8)}:{rng.choice(['', ' ', chr(9), '  '])}{word('ab ,;=/()', 20).strip()}{rng.choice(['', ' '])}"
              for _ in range(rng.randint(0, 6))]
    body = rng.randbytes(rng.choice([0, 0, 1, 5, 300]))
    framed = body
    if body and rng.random() < 0.5:
        fields.append("Transfer-Encoding: chunked")
        framed, at = b"", 0
        while at < len(body):
            piece = body[at:at + rng.randint(1, 200)]
            framed += b"%x%b\r\n%b\r\n" % (len(piece), rng.choice([b"", b";a=b"]), piece)
            at += len(piece)
        framed += b"0\r\n" + rng.choice([b"", b"T: v\r\n"]) + b"\r\n"
    elif body or rng.random() < 0.3:
        fields.append(f"Content-Length: {len(body)}")
    fields.append(rng.choice(["Host: localhost:8484", "host: a.b", "HOST:[::1]"]))
    rng.shuffle(fields)
    target = "/" + word("ab/-_~1", 12) + rng.choice(["", "?", "?a=b&c=%20"])
    line = f"{rng.choice(['GET', 'POST', 'PUT', 'X-Y'])} {rng.choice(['', 'http://h'])}{target} HTTP/1.{rng.choice('1110') if framed is body else 1}"
    return ("\r\n".join([line, *fields]) + "\r\n\r\n").encode() + framed


def test_sound_requests_mean_what_they_mean_to_h11():
    rng = random.Random(9112)
    for _ in range(1500):
        data = generated(rng)
        assert ours(data)[0] == "request" and ours(data) == theirs(data), data


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.choice([rng.randrange(256), *b" \t\r\n:;,%/.\0\x7f0"])
        elif kind == 1:
            del data[at:at + rng.randint(1, 4)]
        elif kind == 2:
            data[at:at] = rng.choice([b"\r\n", b"\n", b"\r", b" ", b"\t", b"%2e", b"..", b"\0", b"chunked", b"Content-Length: 1\r\n",
                                      b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b":", b"0\r\n\r\n", b"\r\n "])
        elif kind == 3:
            lines = bytes(data).split(b"\r\n")
            rng.shuffle(lines)
            data = bytearray(b"\r\n".join(lines))
        else:
            data[at:at] = data[at:at + rng.randint(1, 30)]
        if not data:
            break
    return bytes(data)


@pytest.mark.slow
def test_mutated_requests_never_mean_anything_else_than_to_h11_and_refusals_are_the_documented_ones():
    rng, seen = random.Random(9110), {"request": 0, "refused": 0, "more": 0}
    allowed = [words for _, words in STRICTER.values()]
    seeds = [data for data, _ in [*ACCEPTED.values(), *REFUSED.values()] if len(data) < 1000]
    for number in range(12_000):
        data = mutated(rng, generated(rng) if number % 2 else rng.choice(seeds))
        mine, other = ours(data), theirs(data)
        seen[mine if mine == "more" else mine[0]] += 1
        if mine[0] == "request" and not data.startswith(b"\r\n"):
            assert mine == other, data
        elif mine[0] == "refused" and other[0] == "request":
            assert any(words in mine[1] for words in allowed), (mine, data)
        if number % 4 == 0:
            found = outcomes([data])
            assert outcomes([data[at:at + 1] for at in range(len(data))]) == found, data
    assert min(seen.values()) > 500, seen


def test_any_bytes_end_in_requests_a_refusal_or_more():
    rng = random.Random(7)
    for _ in range(3000):
        data = bytes(rng.choice(b"GET / HTTP/1.1\r\n:0a%\0\xff") for _ in range(rng.randint(1, 200))) + b"\r\n\r\n"
        assert all(isinstance(found, (c.HttpRequest, int)) for found in outcomes([data]))


# Answers

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


def parsed(data):
    head, _, body = data.partition(b"\r\n\r\n")
    line, *fields = head.decode("ascii").split("\r\n")
    return line, dict(field.split(": ", 1) for field in fields), body


def test_an_answer_has_its_length_its_type_and_the_fields_of_every_answer():
    line, fields, body = parsed(c.encode_response(c.json_response({"a": 1}, 201, (("Location", "/x"),)), DATE))
    assert (line, body) == ("HTTP/1.1 201 Created", b'{"a":1}')
    assert fields == {"Date": DATE, "Content-Type": "application/json", "Content-Length": "7", "Location": "/x",
                      "Cache-Control": "no-store", **dict(c.COMMON_FIELDS)}
    assert parsed(c.encode_response(c.HttpResponse(b"x"), DATE, connection="close"))[1]["Connection"] == "close"


def test_answers_that_differ_in_one_thing_differ_in_it_whatever_was_encoded_before():
    plain = c.HttpResponse(b"x")
    for connection in ("", "close", "keep-alive", ""):
        assert parsed(c.encode_response(plain, DATE, connection=connection))[1].get("Connection", "") == connection
    for response in (plain, plain.replace(status=404), plain.replace(content_type="text/css"), plain.replace(fields=(("A", "b"),)), plain):
        line, fields, _ = parsed(c.encode_response(response, DATE))
        assert (line.split()[1], fields["Content-Type"], fields.get("A")) == (str(response.status), response.content_type, dict(response.fields).get("A"))
    for number in range(500):
        assert parsed(c.encode_response(plain.replace(fields=(("ETag", str(number)),)), DATE))[1]["ETag"] == str(number)
    assert len(c._HEADS) <= 201, "what is remembered is bounded"


def test_an_answer_to_head_has_the_length_and_no_body():
    _, fields, body = parsed(c.encode_response(c.HttpResponse(b"12345"), DATE, True))
    assert (fields["Content-Length"], body) == ("5", b"")


@pytest.mark.parametrize("status", [204, 304])
def test_answers_that_have_no_body_have_no_length(status):
    _, fields, body = parsed(c.encode_response(c.HttpResponse(b"lost", status), DATE))
    assert body == b"" and "Content-Length" not in fields and "Content-Type" not in fields


@pytest.mark.parametrize("name, value", [
    ("A", "b\r\nSet-Cookie: x"), ("A", "b\nc"), ("A", "b\rc"), ("A", "b\0"), ("A", "\x7f"), ("A", "ä"), ("A: b\r\nC", "d"),
    ("A ", "b"), ("", "b"), ("A:", "b"), ("ä", "b"), ("A\n", "b"), ("A", "b\u2028c")])
def test_no_field_of_an_answer_can_break_out_of_its_line(name, value):
    with pytest.raises(ValueError):
        c.encode_response(c.HttpResponse(b"", 200, "text/plain", ((name, value),)), DATE)
    with pytest.raises(ValueError):
        c.encode_stream_head(c.HttpStream(None, "text/plain", ((name, value),)), DATE, True)


def test_a_stream_has_no_length_and_shows_its_end():
    line, fields, _ = parsed(c.encode_stream_head(c.HttpStream(None), DATE, True))
    assert line == "HTTP/1.1 200 OK" and "Content-Length" not in fields
    assert (fields["Transfer-Encoding"], fields["Connection"], fields["Content-Type"]) == ("chunked", "close", "text/event-stream")
    assert "Transfer-Encoding" not in parsed(c.encode_stream_head(c.HttpStream(None), DATE, False))[1]
    pieces = [b"data: x\n\n", b"y" * 300, b""]
    request = post(CHUNKED, body=b"".join(map(c.encode_chunk, pieces)))
    assert one(request).body == b"".join(pieces)


def test_every_error_has_an_answer_with_a_stable_code():
    def all_errors(kind):
        return [kind, *(found for below in kind.__subclasses__() for found in all_errors(below))]
    for kind in all_errors(c.ClaudomatorError):
        assert kind.http_status in c.HTTP_REASONS, kind
    answer = c.error_response(c.InvalidInput("no", ["a", "b"]))
    assert answer.status == 422 and c.parse_json(answer.body) == {
        "error": {"code": "invalid", "message": "no\n  a\n  b", "problems": ["a", "b"]}}
    answer = c.error_response(c.HttpError(405, "read only", ("Allow", "GET")))
    assert (answer.status, c.parse_json(answer.body)["error"]["code"], answer.fields[-1]) == (405, "method_not_allowed", ("Allow", "GET"))


def test_dates_are_those_of_the_standard_library():
    rng = random.Random(1)
    for unix_s in (0, 784111777, 951782400, *(rng.randrange(4102444800) for _ in range(300))):
        assert c.http_date(unix_s) == email.utils.formatdate(unix_s, usegmt=True)


@pytest.mark.parametrize("field, expected", [
    ('"a"', True), ('W/"a"', True), ('"b", "a"', True), ('"b" ,\tW/"a"', True), ("*", True), ("", False), ('"b"', False), ("a", False),
    ('"A"', False), ('"a', False), ('"b", *', False)])
def test_if_none_match_compares_weakly(field, expected):
    assert c.etag_matches(field, '"a"') is expected and c.etag_matches(field, 'W/"a"') is expected


@pytest.mark.parametrize("host, expected", [
    ("localhost", True), ("LOCALHOST:8484", True), ("127.0.0.1:1", True), ("127.255.0.9", True), ("[::1]:80", True), ("x.localhost", True),
    ("10.0.0.5:8484", True), ("ci.example.org", True), ("CI.Example.org:443", True), ("[fe80::1]", True),
    ("evil.com", False), ("127.0.0.1.evil.com", False), ("127.evil.com", False), ("127.0.0", False), ("128.0.0.1", False),
    ("localhost.evil.com", False), ("evillocalhost", False), ("10.0.0.6", False), ("xci.example.org", False), ("[::2]", False),
    ("0.0.0.0", False), ("127.0.0.x", False)])
def test_only_hosts_that_are_meant_are_served(host, expected):
    assert c.host_allowed(host, ("10.0.0.5", "ci.example.org", "fe80::1")) is expected


@pytest.mark.parametrize("origin, host, expected", [
    (None, "localhost", True), ("", "localhost", True), ("http://localhost:8484", "localhost:8484", True),
    ("HTTP://LOCALHOST:8484", "localhost:8484", True), ("http://localhost", "localhost:80", True), ("https://ci.example.org", "ci.example.org", True),
    ("http://[::1]:8484", "[::1]:8484", True), ("https://ci.example.org:443", "ci.example.org", True),
    ("null", "localhost", False), ("http://localhost:8485", "localhost:8484", False), ("http://evil.com", "localhost:8484", False),
    ("http://localhost:8484.evil.com", "localhost:8484", False), ("http://localhost", "localhost:8484", False), ("file://", "localhost", False),
    ("ftp://localhost", "localhost", False), ("http://localhost:8484/x", "localhost:8484", False), ("http://u@localhost:8484", "localhost:8484", False),
    ("localhost:8484", "localhost:8484", False), ("http://localhost:8484, http://localhost:8484", "localhost:8484", False),
    ("http://127.0.0.1:8484", "localhost:8484", False), ("https://localhost:80", "localhost", False), ("http://", "", False)])
def test_only_pages_of_the_same_origin_may_act(origin, host, expected):
    assert c.origin_allowed(origin, host) is expected
