"""Section 15: the WebSocket's bytes.  Frames come from the encoder of tests/ws_client.py."""
import base64
import hashlib
import random
import struct

import pytest

import claudomator as c
from tests.ws_client import MASK, frame

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3
OPENING = {"host": "server.example.com", "upgrade": "websocket", "connection": "Upgrade", "sec-websocket-key": KEY,
           "sec-websocket-version": "13"}


def fed(*pieces, limit=c.MAX_MESSAGE):
    """What a decoder makes of the pieces: (kind, data) or (kind, data, close code), an error as its code."""
    decoder = c.MessageDecoder(limit)
    return [plain(event) for piece in pieces for event in decoder.feed(piece)]


def plain(event):
    if isinstance(event, c.WebSocketError):
        return event.close_code
    return (event.kind, event.data) + ((event.close_code,) if event.kind == "close" else ())


def code_of(stream, **options):
    """The close code with which a stream ends that breaks a rule."""
    last = fed(stream, **options)[-1]
    assert isinstance(last, int), last
    return last


# The handshake


def test_the_rfcs_key_gets_the_rfcs_answer():
    assert c.accept_key(KEY) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert c.check_handshake("GET", 1, OPENING) == [
        ("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")]


def test_keys_are_answered_as_hashlib_and_base64_do():
    draw = random.Random(5)
    for _ in range(50):
        key = base64.b64encode(draw.randbytes(16)).decode()
        guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        assert c.accept_key(key) == base64.b64encode(hashlib.sha1(key.encode() + guid).digest()).decode()


@pytest.mark.parametrize("change", [
    {"upgrade": "WebSocket"}, {"upgrade": "h2c, websocket"}, {"connection": "keep-alive, Upgrade"},
    {"connection": "keep-alive,upgrade"}, {"sec-websocket-extensions": "permessage-deflate"}])
def test_an_opening_request_may_be_written_like_this(change):
    assert dict(c.check_handshake("GET", 1, {**OPENING, **change})).keys() == {"Upgrade", "Connection", "Sec-WebSocket-Accept"}


@pytest.mark.parametrize("status, method, minor, change", [
    (405, "POST", 1, {}), (405, "HEAD", 1, {}), (405, "get", 1, {}), (400, "GET", 0, {}),
    (426, "GET", 1, {"upgrade": None}), (426, "GET", 1, {"upgrade": "h2c"}), (426, "GET", 1, {"upgrade": "websockets"}),
    (400, "GET", 1, {"connection": None}), (400, "GET", 1, {"connection": "close"}),
    (426, "GET", 1, {"sec-websocket-version": None}), (426, "GET", 1, {"sec-websocket-version": "8"}),
    (426, "GET", 1, {"sec-websocket-version": "13, 8"}), (426, "GET", 1, {"sec-websocket-version": "+13"}),
    *[(400, "GET", 1, {"sec-websocket-key": key}) for key in (
        None, "", KEY[:-1], KEY + "=", f"{KEY}, {KEY}", "dGhlIHNhbXBsZSBub25jZWFh", "dGhlIHNhbXBsZSBub25jZ===",
        "dGhlIHNhbXBsZSBub25jZQ=\n", "dGhlIHNhbXB*ZSBub25jZQ==", "=GhlIHNhbXBsZSBub25jZQ=", "ключключключключключключ")]])
def test_what_opens_no_websocket_is_refused(status, method, minor, change):
    headers = {name: value for name, value in {**OPENING, **change}.items() if value is not None}
    with pytest.raises(c.HandshakeError) as refused:
        c.check_handshake(method, minor, headers)
    assert refused.value.http_status == status
    fields = dict(refused.value.fields)
    assert (fields.get("Sec-WebSocket-Version"), fields.get("Upgrade")) == (("13", "websocket") if status == 426 else (None, None))
    assert fields.get("Allow") == ("GET" if status == 405 else None)


@pytest.mark.parametrize("offered, spoken, chosen", [
    ("a, b", ("b", "a"), "a"), ("x,b", ("a", "b"), "b"), ("x", ("a",), None), (None, ("a",), None), ("a", (), None),
    ("A", ("a",), None), (", ,", ("a",), None)])
def test_the_clients_first_choice_of_a_subprotocol_is_taken(offered, spoken, chosen):
    headers = OPENING if offered is None else {**OPENING, "sec-websocket-protocol": offered}
    assert dict(c.check_handshake("GET", 1, headers, spoken)).get("Sec-WebSocket-Protocol") == chosen


# Frames to the client


def test_frames_are_the_rfcs():  # section 5.7
    assert c.encode_message("Hello") == bytes.fromhex("810548656c6c6f")
    assert c.encode_frame(c.OP_PING, b"Hello") == bytes.fromhex("890548656c6c6f")
    assert c.encode_message(bytes(256)) == bytes.fromhex("827E0100") + bytes(256)
    assert c.encode_message(bytes(65536)) == bytes.fromhex("827F0000000000010000") + bytes(65536)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_frame_to_the_client_is_a_clients_without_the_mask(size):
    assert c.encode_message("x" * size) == frame(c.OP_TEXT, "x" * size, mask=None)


def test_a_close_frame_has_its_code_and_a_reason_that_fits():
    assert c.encode_close(1000, "bye") == b"\x88\x05\x03\xe8bye"
    assert c.encode_close(c.NO_CLOSE_CODE) == b"\x88\x00"
    long = c.encode_close(1001, "x" + "é" * 100)
    assert long == b"\x88\x7d\x03\xe9x" + "é".encode() * 61
    assert c.encode_close(1001, "y" * 200) == b"\x88\x7d\x03\xe9" + b"y" * 123


# Frames from the client


def test_the_rfcs_examples_are_understood():  # section 5.7
    assert fed(bytes.fromhex("818537fa213d7f9f4d5158")) == [("text", "Hello")]
    assert fed(bytes.fromhex("8a8537fa213d7f9f4d5158")) == [("pong", b"Hello")]
    assert fed(frame(c.OP_TEXT, "Hel", final=False), frame(c.OP_CONTINUATION, "lo")) == [("text", "Hello")]


TALK = b"".join([
    frame(c.OP_TEXT, "Grüße, 世界 🎉"), frame(c.OP_BINARY, bytes(range(200))), frame(c.OP_PING, b"p" * 125), frame(c.OP_TEXT),
    frame(c.OP_TEXT, "frag".encode() + "é".encode()[:1], final=False), frame(c.OP_PING), frame(c.OP_CONTINUATION, b"", final=False),
    frame(c.OP_PONG, b"\xff"), frame(c.OP_CONTINUATION, "é".encode()[1:] + b"mented"),
    frame(c.OP_BINARY, b"\xfe" * 5, final=False), frame(c.OP_CONTINUATION, b"\xff" * 126), frame(c.OP_CLOSE, b"\x03\xe8ende"),
    b"whatever follows", frame(c.OP_TEXT, "x")])
HEARD = [("text", "Grüße, 世界 🎉"), ("binary", bytes(range(200))), ("ping", b"p" * 125), ("text", ""), ("ping", b""),
         ("pong", b"\xff"), ("text", "fragémented"), ("binary", b"\xfe" * 5 + b"\xff" * 126), ("close", "ende", 1000)]


def test_the_events_are_the_same_whatever_the_split():
    assert fed(TALK) == HEARD
    for cut in range(len(TALK) + 1):
        assert fed(TALK[:cut], TALK[cut:]) == HEARD
    assert fed(*(TALK[at:at + 1] for at in range(len(TALK)))) == HEARD
    draw = random.Random(3)
    for _ in range(100):
        cuts = sorted(draw.randrange(len(TALK)) for _ in range(8))
        assert fed(*(TALK[a:b] for a, b in zip([0, *cuts], [*cuts, len(TALK)]))) == HEARD


def test_an_event_comes_with_its_last_byte_and_not_before():
    whole = frame(c.OP_TEXT, "Hello")
    for cut in range(len(whole)):
        decoder = c.MessageDecoder()
        assert decoder.feed(whole[:cut]) == []
        assert [plain(event) for event in decoder.feed(whole[cut:])] == [("text", "Hello")]


@pytest.mark.parametrize("size", [0, 1, 124, 125, 126, 127, 128, 65535, 65536, 65537])
def test_a_payload_may_have_this_size(size):
    payload = random.Random(size).randbytes(size)
    assert fed(frame(c.OP_BINARY, payload)) == [("binary", payload)]
    assert fed(frame(c.OP_BINARY, payload)[:size // 2], frame(c.OP_BINARY, payload)[size // 2:]) == [("binary", payload)]


def test_unmasking_goes_on_where_it_stopped():
    payload, key = bytes(range(256)) * 3, b"\x01\x80\xff\x00"
    expected = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))
    for cut in range(20):
        assert c.unmask(payload[:cut], key) + c.unmask(payload[cut:], key, cut) == expected


@pytest.mark.parametrize("what, broken", {
    **{f"reserved bits {bits}, opcode {code}": frame(code, b"x", reserved=bits) for bits in range(1, 8) for code in (1, 9)},
    **{f"opcode {code}": frame(code, b"x") for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "reserved bits without a payload": frame(c.OP_TEXT, reserved=4),
    "a frame without a mask": frame(c.OP_TEXT, "x", mask=None),
    "a ping without a mask": frame(c.OP_PING, mask=None),
    "a close frame without a mask": frame(c.OP_CLOSE, mask=None),
    "a long ping": frame(c.OP_PING, b"x" * 126),
    "a very long ping": frame(c.OP_PING, b"x" * 65536),
    "a long close frame": frame(c.OP_CLOSE, b"\x03\xe8" + b"x" * 124),
    "a ping of 1 byte with a long length": frame(c.OP_PING, b"x", form=16),
    "a fragmented ping": frame(c.OP_PING, b"x", final=False),
    "a fragmented close frame": frame(c.OP_CLOSE, b"\x03\xe8", final=False),
    "125 bytes with 16 bits": frame(c.OP_TEXT, "x" * 125, form=16),
    "no bytes with 16 bits": frame(c.OP_TEXT, "", form=16),
    "65535 bytes with 64 bits": frame(c.OP_TEXT, "x" * 65535, form=64),
    "5 bytes with 64 bits": frame(c.OP_TEXT, "x" * 5, form=64),
    "the highest bit of a length": b"\x81\xff" + struct.pack("!Q", 1 << 63) + MASK,
    "a continuation of nothing": frame(c.OP_CONTINUATION, "x"),
    "an unfinished continuation of nothing": frame(c.OP_CONTINUATION, "x", final=False),
    "a text in a text": frame(c.OP_TEXT, "a", final=False) + frame(c.OP_TEXT, "b"),
    "a binary message in a text": frame(c.OP_TEXT, "a", final=False) + frame(c.OP_BINARY, "b"),
    "a text in a binary message": frame(c.OP_BINARY, "a", final=False) + frame(c.OP_TEXT, "b", final=False),
    "a message after an empty beginning": frame(c.OP_TEXT, final=False) + frame(c.OP_TEXT, "b"),
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_protocol_error_closes_with_1002(what, broken):
    assert code_of(broken) == 1002
    before = frame(c.OP_TEXT, "before") + frame(c.OP_PING, b"p")
    assert fed(before + broken + frame(c.OP_TEXT, "after")) == [("text", "before"), ("ping", b"p"), 1002]
    assert fed(*(bytes([byte]) for byte in before + broken)) == [("text", "before"), ("ping", b"p"), 1002]


def test_a_message_is_over_with_its_final_fragment():
    assert fed(frame(c.OP_TEXT, "a", final=False), frame(0, "b"), frame(0, "c")) == [("text", "ab"), 1002]


def test_a_fault_in_the_first_two_bytes_is_seen_with_them():
    for head in (b"\xc1\x80", b"\x83\x80", b"\x81\x00", b"\x89\xfe", b"\x09\x80"):
        assert fed(head) == [1002]


def test_nothing_is_heard_after_an_error_or_a_close_frame():
    for end in (frame(3), frame(c.OP_CLOSE), frame(c.OP_CLOSE, b"\x03\xe8")):
        decoder = c.MessageDecoder()
        assert not decoder.ended and len(decoder.feed(end)) == 1 and decoder.ended
        assert decoder.feed(frame(c.OP_TEXT, "x")) == [] and decoder.feed(frame(3)) == []
        assert decoder._held == b"", "and nothing of it is kept"


# Limits


def test_a_message_of_the_limit_passes_and_one_byte_more_does_not():
    assert fed(frame(c.OP_TEXT, "x" * 1000), limit=1000) == [("text", "x" * 1000)]
    assert code_of(frame(c.OP_TEXT, "x" * 1001), limit=1000) == 1009
    parts = [frame(c.OP_BINARY, b"x" * 400, final=False), frame(0, b"x" * 400, final=False)]
    assert fed(*parts, frame(0, b"x" * 200), limit=1000) == [("binary", b"x" * 1000)]
    assert fed(*parts, frame(c.OP_PING), frame(0, b"x" * 201), limit=1000) == [("ping", b""), 1009]
    assert fed(*[frame(c.OP_TEXT, "x" * 900)] * 3, limit=1000) == [("text", "x" * 900)] * 3


def test_too_much_is_refused_by_its_header_alone():
    assert fed(frame(c.OP_BINARY, bytes(70000))[:14], limit=65536) == [1009]
    assert fed(b"\x82\xff" + struct.pack("!Q", (1 << 63) - 1) + MASK) == [1009]


def test_endless_fragments_without_bytes_take_no_memory():
    decoder = c.MessageDecoder()
    decoder.feed(frame(c.OP_TEXT, final=False))
    for _ in range(1000):
        assert decoder.feed(frame(0, final=False)) == []
    assert len(decoder._message) == len(decoder._held) == 0
    assert [plain(event) for event in decoder.feed(frame(0, "x"))] == [("text", "x")]


# Text

BOUNDS = [  # RFC 3629 section 4: the bytes that may follow, by the first
    ((0x00, 0x7F), ()), ((0xC2, 0xDF), ((0x80, 0xBF),)), ((0xE0, 0xE0), ((0xA0, 0xBF), (0x80, 0xBF))),
    ((0xE1, 0xEC), ((0x80, 0xBF),) * 2), ((0xED, 0xED), ((0x80, 0x9F), (0x80, 0xBF))), ((0xEE, 0xEF), ((0x80, 0xBF),) * 2),
    ((0xF0, 0xF0), ((0x90, 0xBF), (0x80, 0xBF), (0x80, 0xBF))), ((0xF1, 0xF3), ((0x80, 0xBF),) * 3),
    ((0xF4, 0xF4), ((0x80, 0x8F), (0x80, 0xBF), (0x80, 0xBF)))]


def first_bad_byte(data):
    """Where UTF-8 ends by the RFC's table: the index of the first byte that cannot stand there, or ``None``."""
    follow = []
    for at, byte in enumerate(data):
        if follow:
            low, high = follow.pop(0)
            if not low <= byte <= high:
                return at
            continue
        for (low, high), rest in BOUNDS:
            if low <= byte <= high:
                follow = list(rest)
                break
        else:
            return at
    return None


def fails_at(data):
    """The index of the byte with which the decoder, fed one byte at a time, gives up."""
    decoder = c.MessageDecoder()
    stream = frame(c.OP_TEXT, data, final=False)
    head = len(stream) - len(data)
    decoder.feed(stream[:head])
    return next((at for at in range(len(data)) if decoder.feed(stream[head + at:head + at + 1])), None)


EDGES = (0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFF)


def test_the_first_bad_byte_of_a_text_ends_it_at_once():
    cases = [bytes([first]) for first in range(256)]
    cases += [bytes([first, second]) for first in (*range(0xC0, 0x100), 0x80) for second in EDGES]
    cases += [bytes([first, second, third]) for first in (0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4)
              for second in EDGES for third in EDGES]
    draw = random.Random(11)
    letters = "aé世🎉\U0010ffff\ud7ff\ue000".encode()
    for _ in range(500):
        data = bytearray(letters * 2)
        data[draw.randrange(len(data))] = draw.choice(EDGES)
        cases.append(bytes(data))
    for data in cases:
        assert fails_at(data) == first_bad_byte(data), data
        assert (code_of(frame(c.OP_TEXT, data)) if decodes(data) is None else fed(frame(c.OP_TEXT, data))) \
            == (1007 if decodes(data) is None else [("text", decodes(data))])


def decodes(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def test_a_bad_byte_ends_the_text_across_fragments_too():
    bad = "κόσμε".encode() + b"\xf4\x90\x80\x80" + b"edited"
    decoder = c.MessageDecoder()
    assert decoder.feed(frame(c.OP_TEXT, bad[:11], final=False)) == []
    assert decoder.feed(frame(c.OP_PING)) != []
    assert [plain(event) for event in decoder.feed(frame(0, bad[11:12], final=False))] == [1007]


def test_a_text_that_ends_within_a_character_is_refused_and_the_next_text_begins_anew():
    assert code_of(frame(c.OP_TEXT, b"\xe4\xb8")) == 1007
    assert code_of(frame(c.OP_TEXT, b"\xe4\xb8", final=False) + frame(0)) == 1007
    assert fed(frame(c.OP_TEXT, "世"), frame(c.OP_TEXT, "界")) == [("text", "世"), ("text", "界")]


def test_binary_messages_may_hold_any_bytes():
    assert fed(frame(c.OP_BINARY, b"\xff\xc0"), frame(c.OP_TEXT, "x")) == [("binary", b"\xff\xc0"), ("text", "x")]


# Close frames


@pytest.mark.parametrize("code", [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_a_client_may_close_with(code):
    assert fed(frame(c.OP_CLOSE, struct.pack("!H", code) + "adiós".encode())) == [("close", "adiós", code)]
    assert fed(frame(c.OP_CLOSE, struct.pack("!H", code))) == [("close", "", code)]


@pytest.mark.parametrize("code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_a_client_may_not_close_with(code):
    assert code_of(frame(c.OP_CLOSE, struct.pack("!H", code))) == 1002


def test_a_close_frame_may_be_empty_but_not_half_a_code_nor_have_a_reason_that_is_no_text():
    assert fed(frame(c.OP_CLOSE)) == [("close", "", c.NO_CLOSE_CODE)]
    assert code_of(frame(c.OP_CLOSE, b"\x03")) == 1002
    assert code_of(frame(c.OP_CLOSE, b"\x03\xe8\xce\xba\xff")) == 1007
    assert code_of(frame(c.OP_CLOSE, b"\x03\xe8\xe4\xb8")) == 1007
    assert fed(frame(c.OP_CLOSE, b"\x03\xe8" + b"x" * 123)) == [("close", "x" * 123, 1000)]
    assert fed(frame(c.OP_TEXT, "a", final=False) + frame(c.OP_CLOSE)) == [("close", "", c.NO_CLOSE_CODE)]


# Whatever comes


@pytest.mark.slow
def test_mutated_streams_end_in_events_or_one_error_and_the_split_does_not_matter():
    draw, errors = random.Random(7), 0
    for _ in range(3000):
        data = bytearray(TALK)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(3)
            data[at:at + kind] = draw.randbytes(draw.randrange(3)) if kind else draw.randbytes(1)
        heard = fed(bytes(data), limit=4096)
        errors += isinstance((heard or [0])[-1], int)
        assert all(isinstance(event, tuple) for event in heard[:-1])
        cut = draw.randrange(len(data))
        assert fed(bytes(data[:cut]), bytes(data[cut:]), limit=4096) == heard
    assert 1000 < errors < 3000


def test_random_bytes_are_harmless():
    draw = random.Random(9)
    for _ in range(2000):
        heard = fed(draw.randbytes(draw.randrange(60)), draw.randbytes(40), limit=4096)
        assert all(isinstance(event, tuple) for event in heard[:-1])
