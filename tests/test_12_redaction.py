"""Redaction: no secret leaves, whole or in pieces, in whatever form; and tokens are what they claim to be."""
import hashlib
import hmac
import json
import random

import pytest

import claudomator as c

KEY = b"k" * 43
RUN = "0c0ffee0-1234-4567-89ab-0123456789ab"
TOKEN = c.agent_token(KEY, RUN)
ODD = 'say "hi"\\to\n\tthé wörld 𝕏'
SECRETS = ["hunter2hunter2", "abcabcabcab", "cabcabcdef", "-----BEGIN\nline two\n-----END", ODD]


@pytest.fixture(scope="module")
def redactor():
    return c.Redactor(SECRETS)


TEXTS = [
    "", "nothing to hide", "hunter2hunter2", "a hunter2hunter2 b", "hunter2hunter2hunter2hunter2", "hunter2hunter",
    "xhunter2hunterhunter2hunter2", "abcabcabcabcabcabcabc", "abcabcabcabcdefg", "hunter2hunter2abcabcabcab",
    "-----BEGIN\nline two\n-----END\n", "-----BEGIN\nline two\n-----EN", ODD, f"<{ODD}{ODD}>", TOKEN, f"x{TOKEN}y", TOKEN[:-1],
    TOKEN[:-1] + " ", "clagt", "clagclagt" + TOKEN, json.dumps({"a": ODD}), json.dumps([json.dumps({"a": ODD + "!"})]),
]


def test_random_texts_in_random_pieces_give_what_the_whole_gives(redactor):
    chance = random.Random(12)
    parts = [*SECRETS, TOKEN, "abc", "hunter2", "clagt", "-----BEGIN", " ", "\\", '"', "é"]
    for _ in range(300):
        data = "".join(chance.choices(parts, k=chance.randrange(8))).encode()
        data = data[chance.randrange(3):len(data) - chance.randrange(3)]
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(4))
        whole = redactor.clean(data)
        assert b"".join(redactor.clean(data, a, b) for a, b in zip([0, *cuts], [*cuts, len(data)])) == whole
        assert not any(secret.encode() in whole for secret in (*SECRETS, TOKEN))


@pytest.mark.parametrize("data, kept_back", [
    (b"a line\n", 0), (b"a hunt", 4), (b"hunter\n", 0), (b"hunter2hunter2", 7), (b"x" * 500 + b"hunter2hunter", 13),
    (TOKEN[:-1].encode(), len(TOKEN) - 1), (b"-----BEGIN", 10)])
def test_only_what_may_be_the_beginning_of_a_secret_is_kept_back(redactor, data, kept_back):
    assert redactor.unfinished(data) == kept_back < redactor.longest


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_by_offset_join_to_the_whole_wherever_they_are_cut(redactor, text):
    data = text.encode()
    for cut in range(len(data) + 1):
        pieces = redactor.clean(data, 0, cut), redactor.clean(data, cut, len(data))
        assert b"".join(pieces) == redactor.clean(data), cut


def test_a_reader_who_begins_inside_a_secret_sees_nothing_of_it(redactor):
    data = b"a hunter2hunter2 b"
    assert redactor.clean(data, 5) == b" b" and redactor.clean(data, 2) == b"[redacted] b"
    assert redactor.clean(data, 0, 5) == b"a [redacted]" and redactor.clean(data, 5, 9) == b""


def test_overlapping_secrets_leave_nothing_of_either():
    redactor = c.Redactor(["abcdefgh12", "efgh12345678"])
    assert redactor.clean("<abcdefgh12345678>") == "<[redacted]>"
    assert redactor.clean("<abcdefgh12><efgh12345678>") == "<[redacted]><[redacted]>"


def test_a_secret_inside_another_ends_nothing_early():
    redactor, data = c.Redactor(["abcdefgh123456789Q", "12345678", "123456789Qzz"]), b"abcdefgh123456789Qx"
    assert redactor.clean(data) == b"[redacted]x" == redactor.clean(data, 0, 18) + redactor.clean(data, 18)


@pytest.mark.parametrize("secret", [ODD, 'quo"ted-secret', "back\\slashed", "ümläut-ümläut", "tab\tand\nline", "\x01\x02control", "𝕏" * 8])
def test_a_secret_is_found_in_json_and_in_json_within_json(secret):
    redactor, document = c.Redactor([secret]), {"x": secret}
    for ascii_only in (True, False):
        once = json.dumps(document, ensure_ascii=ascii_only)
        twice = json.dumps({"line": once}, ensure_ascii=ascii_only)
        assert json.loads(redactor.clean(once)) == {"x": "[redacted]"}
        assert json.loads(json.loads(redactor.clean(twice))["line"]) == {"x": "[redacted]"}
        answer = redactor.document(c.format_json({"text": once, "n": 1}).encode() + b"\n")
        assert answer.endswith(b"}\n") and json.loads(json.loads(answer)["text"]) == {"x": "[redacted]"}
        answer = redactor.document(c.format_json({"text": twice, "n": 1}).encode())
        assert json.loads(json.loads(json.loads(answer)["text"])["line"]) == {"x": "[redacted]"}


def test_a_document_without_secrets_is_the_same_object_and_names_are_never_replaced():
    redactor, plain = c.Redactor(["execution", "12345678"]), b'{"a":[1,null,true]}'
    assert redactor.document(plain) is plain
    assert redactor.document(b'{"execution":["an execution",12345678]}') == b'{"execution":["an [redacted]",12345678]}'


def test_short_values_and_those_that_no_text_can_hold_are_left_alone():
    redactor = c.Redactor(["", "short", "1234567", "nul\0nul\0", "\ud800" * 9, "long enough"])
    assert redactor.clean("short 1234567 long enough") == "short 1234567 [redacted]"


def test_a_value_is_redacted_at_every_depth():
    redactor = c.Redactor(["hunter2hunter2"])
    value = {"a": ["hunter2hunter2", {"b": ("x hunter2hunter2",)}], "n": 5, "none": None}
    assert redactor.value(value) == {"a": ["[redacted]", {"b": ["x [redacted]"]}], "n": 5, "none": None}


def test_without_secrets_only_tokens_of_agents_go():
    assert c.Redactor().clean(f"token {TOKEN}, not {TOKEN[:-1]}") == f"token [redacted], not {TOKEN[:-1]}"
    assert c.Redactor().clean(TOKEN[:-1] + "-") == TOKEN[:-1] + "-"


# -- logs by offset


def test_a_log_is_read_without_secrets_from_every_offset_in_pieces_of_every_size(tmp_path, redactor):
    log, text = tmp_path / "log", f"one\ntwo hunter2hunter2 é {TOKEN} {ODD}\nthree abcabcabcabcdef"
    log.write_text(text)
    data = text.encode()
    for size in (4, 5, 9, 40, 1000):
        for begin in range(0, len(data), 3):
            offset, said = begin, ""
            while (piece := c.read_log(str(log), offset, True, redactor, size))[1] > offset:
                said, offset = said + piece[0], piece[1]
                assert begin or piece[0].isascii() or piece[0].encode(), "no character is cut"
            assert offset == len(data), "offsets are those of the file"
            assert said.encode("utf-8", "surrogateescape") == redactor.clean(data, begin)


def test_an_unfinished_secret_waits_for_its_end(tmp_path, redactor):
    log = tmp_path / "log"
    log.write_bytes(b"password: hunter2hun")
    assert c.read_log(str(log), 0, False, redactor) == ("password: ", 10)
    assert c.read_log(str(log), 10, False, redactor) == ("", 10)
    assert c.read_log(str(log), 10, True, redactor) == ("hunter2hun", 20), "it will never be a secret"
    with open(log, "ab") as file:
        file.write(b"ter2 and")
    assert c.read_log(str(log), 10, False, redactor) == ("[redacted] and", 28)
    log.write_bytes(b"-----BEGIN\nline two\n")
    assert c.read_log(str(log), 0, False, redactor) == ("", 0), "also across lines"


# -- tokens


def test_an_agents_token_is_an_hmac_that_names_its_execution():
    assert TOKEN == "clagt" + RUN.replace("-", "") + hmac.digest(KEY, RUN.encode(), "sha256").hex()
    assert c.execution_of_token(TOKEN) == RUN and len(TOKEN) == c.AGENT_TOKEN_LENGTH
    assert c.agent_token(b"other", RUN) != TOKEN != c.agent_token(KEY, RUN[:-1] + "c")


@pytest.mark.parametrize("token", ["", "clagt", "0" * len(TOKEN), TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "x" + TOKEN[1:], TOKEN[:-1] + "g",
                                   TOKEN[5:] + "clagt", TOKEN[:-1] + "é"])
def test_what_has_not_the_shape_of_a_token_names_no_execution(token):
    assert c.execution_of_token(token) is None


@pytest.mark.parametrize("size", [0, 1, 43, 63, 64, 65, 200])
def test_hmac_is_that_of_the_standard_library(size):
    key, message = bytes(range(256))[:size], bytes(range(size))
    assert c.hmac_sha256(key, message) == hmac.digest(key, message, hashlib.sha256)


def test_texts_are_compared_as_a_whole():
    assert c.is_same_text("tokén", "tokén") and not c.is_same_text("token", "tokén")
    assert not c.is_same_text("", "x") and not c.is_same_text("\ud800", "?")
