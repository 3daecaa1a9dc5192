"""Line framing: every split of a stream gives the same lines, and memory stays bounded whatever an agent prints."""
import json
import random
import tracemalloc

import pytest

import claudomator as c

PIECES = ["plain ", "x" * 9, "{}[],:", "ü", "€", "\U0001f600", '\\"', "\\\\", "\\n", "\\u0041", "\\u20ac",
          "\\ud83d\\ude00"]


def lines_of(chunks, limit=c.LONG_LINE, keep=c.KEPT_STRING) -> list[bytes]:
    splitter = c.LineSplitter(limit, keep)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    last = splitter.finish()
    return lines if last is None else [*lines, last]


def random_string(rng: random.Random, pieces: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(pieces)))


def random_line(rng: random.Random) -> bytes:
    values = (f'{rng.choice(("1.5", "null", "[true, {}]"))}, "{random_string(rng, 40)}"'
              for _ in range(rng.randrange(1, 4)))
    return ("[" + ", ".join(values) + "]").encode()


def cut_anywhere(rng: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


# Lines


@pytest.mark.parametrize("stream, lines", [
    (b"", []), (b"\n", [b""]), (b"a", [b"a"]), (b"a\n", [b"a"]), (b"a\nb", [b"a", b"b"]),
    (b"\n\na\n", [b"", b"", b"a"]),
    (b"a\r\nb\r", [b"a\r", b"b\r"]), ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d".encode()]),
    (b"a\x00b\n\xff\xfe\n", [b"a\x00b", b"\xff\xfe"]),
])
def test_lines_end_at_lf_only_and_the_same_for_every_split(stream, lines):
    assert lines_of([stream]) == lines
    assert lines_of([stream[i:i + 1] for i in range(len(stream))]) == lines
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            assert lines_of([stream[:first], stream[first:second], stream[second:]]) == lines


def test_a_line_comes_as_soon_as_its_end_does_and_pending_counts_the_rest():
    splitter = c.LineSplitter()
    assert splitter.feed(b"one\ntwo\nthr") == [b"one", b"two"] and splitter.pending == 3
    assert splitter.feed(b"") == [] and splitter.pending == 3
    assert splitter.feed(b"ee") == [] and splitter.pending == 5
    assert splitter.feed(b"\n") == [b"three"] and splitter.pending == 0
    assert splitter.finish() is None
    splitter.feed(b"end")
    assert splitter.finish() == b"end" and splitter.finish() is None and splitter.pending == 0
    assert splitter.long_lines == 0


def test_a_line_of_exactly_the_limit_is_kept_and_one_byte_more_is_elided():
    line = b'"' + b"x" * 98 + b'"'
    for stream in ([line + b"\n"], [line[:60], line[60:] + b"\n"]):
        assert lines_of(stream, limit=100, keep=10) == [line]
    longer = b'"' + b"x" * 99 + b'"'
    for stream in ([longer + b"\n"], [longer[:60], longer[60:] + b"\n"], [longer]):
        assert lines_of(stream, limit=100, keep=10) == [b'"' + b"x" * 10 + b'"']


def test_over_long_line_is_counted_and_the_stream_goes_on():
    splitter = c.LineSplitter(limit=50, keep=5)
    long = b'{"a":"' + b"x" * 200 + b'","b":2}'
    assert splitter.feed(b"1\n" + long + b"\n2\n" + long[:30]) == [b"1", b'{"a":"xxxxx","b":2}', b"2"]
    assert splitter.long_lines == 1
    assert splitter.feed(long[30:] + b"\n3\n") == [b'{"a":"xxxxx","b":2}', b"3"]
    assert splitter.long_lines == 2


def test_a_long_line_loses_the_ends_of_its_long_strings_only_however_it_is_split():
    for seed in range(1500):
        rng = random.Random(seed)
        line, keep = random_line(rng), rng.randrange(12)
        [elided] = lines_of(cut_anywhere(rng, line + b"\n"), limit=10, keep=keep) if len(line) > 10 else [line]
        assert elided == lines_of([line + b"\n"], limit=10, keep=keep)[0]
        check_elided(json.loads(line), json.loads(elided.decode()), keep)


def check_elided(whole: list, elided: list, keep: int) -> None:
    assert len(whole) == len(elided)
    for one, other in zip(whole, elided):
        if isinstance(one, str):  # a surrogate pair written as two escapes may lose its second half
            assert one.startswith(other.rstrip("\ud83d"))
            assert len(other.encode("utf-8", "surrogatepass")) <= keep
        else:
            assert one == other


def test_every_byte_of_a_string_up_to_the_bound_is_kept_and_no_escape_or_character_is_cut():
    unit_by_text = {r"\u20ac": "€", "é": "é", "\U0001f600": "\U0001f600", r"\\": "\\", r"\"": '"', "x": "x"}
    for text, value in unit_by_text.items():
        size = len(text.encode())
        line = b'["' + text.encode() * 20 + b'",7]'
        for keep in range(0, 3 * size + 1):
            for chunk in range(1, 9):
                chunks = [line[i:i + chunk] for i in range(0, len(line), chunk)]
                assert json.loads(lines_of(chunks, limit=8, keep=keep)[0]) == [value * (keep // size), 7]


@pytest.mark.parametrize("tail, missing", [
    (b"", 0), (b"a", 0), ("é".encode(), 0), ("é".encode()[:1], 1), ("€".encode(), 0), ("€".encode()[:2], 2),
    ("a€".encode()[:2], 1), ("\U0001f600".encode()[:3], 3), ("\U0001f600".encode()[1:], 0), (b"\x80\x80\x80", 0),
])
def test_an_unfinished_character_is_recognised_by_its_first_byte(tail, missing):
    assert c.unfinished_utf8(tail) == missing


def test_bytes_that_are_no_json_and_no_utf8_never_break_the_splitter():
    alphabet = b'"\\u0a{}\n\xc3\xa9\xe2\x82\xac\xf0\x9f\xff\x80 x'
    for seed in range(1500):
        rng = random.Random(seed)
        data = bytes(rng.choice(alphabet) for _ in range(rng.randrange(80)))
        limit, keep = rng.randrange(1, 30), rng.randrange(6)
        lines = lines_of(cut_anywhere(rng, data), limit, keep)
        assert len(lines) == len(data.split(b"\n")) - data.endswith(b"\n") - (not data)
        for line, original in zip(lines, data.split(b"\n")):
            assert line == original if len(original) <= limit else len(line) <= len(original)


@pytest.mark.parametrize("unit", [b"y", b"\\n", "€\\u20ac".encode()], ids=["plain", "escapes", "mixed"])
def test_a_result_line_of_eight_megabytes_stays_parseable_and_costs_little_memory(unit):
    chunk = unit * ((1 << 18) // len(unit) + 1)
    splitter = c.LineSplitter()
    tracemalloc.start()
    splitter.feed(b'{"type":"result","result":"')
    for _ in range(32):
        splitter.feed(chunk)
    assert splitter.pending > 8 << 20
    lines = splitter.feed(b'","is_error":false}\n')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    value, characters = json.loads(lines[0]), c.KEPT_STRING / len(unit) * len(json.loads(b'"' + unit + b'"'))
    assert value["is_error"] is False and 0.99 * characters < len(value["result"]) <= characters
    assert splitter.long_lines == 1 and peak < 4 << 20


def test_a_long_line_that_is_no_json_is_cut_at_the_greatest_size():
    splitter = c.LineSplitter()
    for _ in range(24):
        splitter.feed(b"z" * (1 << 18))
    [line] = splitter.feed(b"\n")
    assert line == b"z" * c.MAX_ELIDED
    assert splitter.feed(b"next\n") == [b"next"]


def test_an_elided_string_leaves_no_empty_pieces_behind():
    splitter = c.LineSplitter(limit=10, keep=4)
    splitter.feed(b'{"a":"')
    for _ in range(1000):
        splitter.feed(b"xx")
    assert len(splitter._parts) < 20
