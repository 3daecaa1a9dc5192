"""Values: records, JSON, durations, times and identifiers against the standard library and RFC examples."""
import copy
import datetime
import json
import math
import pathlib
import pickle
import random
import subprocess
import sys
import uuid

import pytest

import claudomator as c


# Records


class Point(c.Record):
    """A record with a required and an optional field."""

    x: int
    y: int = 2


class Secretive(Point):
    """One more field, which must not be shown."""

    token: str = ""
    _secret = frozenset({"token"})


def test_a_record_takes_fields_by_place_and_name_and_fills_in_defaults():
    assert (Point(1).x, Point(1).y) == (1, 2)
    assert Point(1, 3) == Point(x=1, y=3) == Point(1, y=3)
    assert (Secretive(1, token="t").x, Secretive(1, 5, "t").token) == (1, "t")


@pytest.mark.parametrize("args, kwargs, named", [
    ((), {}, r"missing fields \['x'\]"), ((1, 2, 3), {}, "Point"), ((1,), {"z": 3}, r"unknown fields \['z'\]"),
    ((), {"y": 1}, r"missing fields \['x'\]"), ((), {"z": 1}, r"unknown fields \['z'\], missing fields \['x'\]"),
])
def test_unknown_and_missing_fields_are_type_errors_that_name_them(args, kwargs, named):
    with pytest.raises(TypeError, match=named):
        Point(*args, **kwargs)


def test_a_record_is_immutable_and_replace_makes_a_changed_copy():
    point = Point(1)
    with pytest.raises(AttributeError, match=r"Point is immutable; use replace\(x=...\)"):
        point.x = 5
    changed = point.replace(y=9)
    assert (changed.x, changed.y, point.y) == (1, 9, 2) and type(Secretive(1).replace(x=2)) is Secretive
    with pytest.raises(TypeError):
        point.replace(z=1)


def test_records_are_equal_by_type_and_value_and_hash_so():
    assert Point(1) == Point(1, 2) and Point(1) != Point(2) and hash(Point(1)) == hash(Point(1, 2))
    assert Point(1) != Secretive(1) and Point(1) != (1, 2)
    assert len({Point(1), Point(1), Point(2)}) == 2
    assert copy.copy(Point(3)) == Point(3) and pickle.loads(pickle.dumps(Point(3))) == Point(3)


def test_repr_shows_every_field_but_hides_secrets():
    assert repr(Point(1)) == "Point(x=1, y=2)"
    assert repr(Secretive(1, token="hunter2")) == "Secretive(x=1, y=2, token=***)"
    assert repr(Secretive(1)) == "Secretive(x=1, y=2, token='')"


def test_the_fields_of_a_subclass_do_not_leak_into_its_base():
    assert Point._fields == ("x", "y") and Secretive._fields == ("x", "y", "token")


# JSON

GOOD = ['{}', '[]', '0', '-1.5e3', 'true', 'null', '"\\u00fc\\ud83d\\ude00"', ' \t\r\n[1, {"a": [null]}] ', '"\u2028"',
        '{"a": 1, "a": 2}', '""', '1E400', '123456789012345678901234567890']
BAD = ['', ' ', '{', '[1,]', '{"a"}', "{'a': 1}", '01', '+1', '.5', 'NaN', '-Infinity', '[Infinity]', '"\n"', '"\\x"',
       'nul', '1 2', '{} x', '\ufeff{}', '\u00a01', '[1]\x00', '"', '1_0', '\u0661']


@pytest.fixture(params=["fast", "public"])
def engine(request, monkeypatch):
    """The C scanner and encoder, and what stands in for them on another Python."""
    if request.param == "public":
        monkeypatch.setattr(c, "_scan_once", None)
        monkeypatch.setattr(c, "_encode", None)
    elif c._scan_once is None or c._encode is None:
        pytest.skip("this Python has no _json")


@pytest.mark.parametrize("text", GOOD)
def test_json_is_read_as_the_standard_library_reads_it(engine, text):
    for form in (text, text.encode(), bytearray(text.encode())):
        assert c.parse_json(form) == json.loads(text)


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_one_json_document_is_a_value_error(engine, text):
    with pytest.raises(ValueError):
        c.parse_json(text)
    with pytest.raises(ValueError):
        c.parse_json(text.encode())


def test_deep_nesting_and_wrong_bytes_are_value_errors_and_not_crashes(engine):
    for text in ("[" * 200_000, '{"a":' * 200_000, b'"\xff"', b"\xfe\xff", '"' + "\\" * 9):
        with pytest.raises(ValueError):
            c.parse_json(text)


def test_mutated_json_gives_a_value_or_a_value_error_and_agrees_with_the_standard_library(engine):
    rng = random.Random(2)
    text = '{"type": "result", "n": [1, -2.5e3, true, null], "s": "a\\n\\u20ac\\"b", "o": {"": {}}}'
    for _ in range(3000):
        at = rng.randrange(len(text))
        mutated = text[:at] + rng.choice(('', '"', '\\', '{', '}', ',', '0', 'e', ' ', '\n',
                                          'ü')) + text[at + rng.randrange(3):]
        try:
            expected = json.loads(mutated)
        except ValueError:
            with pytest.raises(ValueError):
                c.parse_json(mutated)
        else:
            assert c.parse_json(mutated) == expected


@pytest.mark.parametrize("value", [
    None, True, False, 0, -7, 1.5, 1e300, 10 ** 30, "", "ü\u2028\U0001f600\"\\\n\x00", [], {}, (1, 2),
    {"a": [None, {"b": 1.0}]},
    {1: 2, None: 3, True: 4, 1.5: 5}, ["x"] * 50,
], ids=repr)
def test_json_is_written_compact_in_ascii_on_one_line(engine, value):
    text = c.format_json(value)
    assert text == json.dumps(value, separators=(",", ":")) and text.isascii() and "\n" not in text
    if not isinstance(value, (tuple, dict)):
        assert c.parse_json(text) == value


@pytest.mark.parametrize("value, error", [
    (math.nan, ValueError), ([math.inf], ValueError), ({"a": -math.inf}, ValueError), (object(), TypeError),
    ([b"x"], TypeError), ({"a": {1, 2}}, TypeError), ({(1, 2): 3}, TypeError),
], ids=repr)
def test_what_json_cannot_say_is_an_error(engine, value, error):
    with pytest.raises(error):
        c.format_json(value)


def test_a_column_that_holds_no_json_reads_as_the_default():
    assert c.parse_json_or('["a"]', []) == ["a"]
    for text in (None, "", "null", "{broken", b""):
        assert c.parse_json_or(text, "default") == "default"
    assert c.parse_json_or("0", 5) == 0 and c.parse_json_or("[]", [1]) == []


# Durations


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("15m", 900), ("1h30m", 5400), ("1.5h", 5400), ("250ms", 0.25), ("7d", 604800), ("0", 0), ("0s", 0),
    (" 5s ", 5), (".5s", 0.5), ("1.s", 1), ("1h2m3.5s", 3723.5), ("2us", 2e-6), ("2µs", 2e-6), ("3ns", 3e-9),
    ("1m1m", 120),
])
def test_go_durations_are_read(text, seconds):
    assert c.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "5", "s", "-5s", "+5s", "1h 30m", "1e3s", "1_0s", "١s", "1.2.3s", ".s",
                                  "5x", "5S", "5sm", "1h30", "inf", "nan", "9" * 400 + "h"])
def test_what_is_no_duration_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(ValueError, match="is no duration; write it like 90s, 15m or 1h30m"):
        c.parse_duration(text)


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (0.25, "0.25s"), (0.9999, "1s"), (1, "1s"), (45.9, "45s"), (60, "1m"), (90, "1m30s"), (3600, "1h"),
    (3605, "1h"),
    (5400, "1h30m"), (5461, "1h31m"), (86400, "1d"), (90061, "1d1h"), (604800, "7d"), (-90, "-1m30s"), (0.0001, "0s"),
])
def test_durations_are_shown_in_at_most_two_units(seconds, text):
    assert c.format_duration(seconds) == text


def test_a_shown_duration_reads_back_with_two_units_of_precision():
    rng = random.Random(3)
    for _ in range(500):
        seconds = rng.choice((rng.random(), rng.uniform(0, 5000), rng.uniform(0, 1e6)))
        shown = c.parse_duration(c.format_duration(seconds))
        assert seconds - max(1.0, seconds * 0.05) <= shown <= seconds + 0.0006


# Times


@pytest.mark.parametrize("text, other", [
    ("1985-04-12T23:20:50.52Z", "1985-04-12T23:20:50.520+00:00"), ("1996-12-19T16:39:57-08:00",
                                                                   "1996-12-20T00:39:57+00:00"),
    ("1937-01-01T12:00:27.87+00:20", "1937-01-01T11:40:27.870+00:00"),  # the examples of RFC 3339 section 5.8
    ("2026-05-13 04:02:20.123456789+00:00", "2026-05-13T04:02:20.123456+00:00"),
    ("2026-05-13 04:02:20+02:00", "2026-05-13T02:02:20+00:00"), ("2026-05-13t04:02:20z", "2026-05-13T04:02:20+00:00"),
    ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00+00:00"), ("2000-02-29T00:00:00Z", "2000-02-29T00:00:00+00:00"),
])
def test_rfc_3339_and_what_go_sqlite3_writes_are_read(text, other):
    assert c.parse_time(text) == pytest.approx(datetime.datetime.fromisoformat(other).timestamp(), abs=1e-5)


def test_a_leap_second_is_the_next_second():
    assert c.parse_time("1990-12-31T23:59:60Z") == c.parse_time("1991-01-01T00:00:00Z")


@pytest.mark.parametrize("text", [
    "", "now", "2026-05-13", "2026-05-13T04:02Z", "2026-05-13T04:02:20", "2026-13-01T00:00:00Z",
    "2026-02-29T00:00:00Z",
    "1900-02-29T00:00:00Z", "2026-04-31T00:00:00Z", "2026-00-01T00:00:00Z", "2026-01-00T00:00:00Z",
    "2026-01-01T24:00:00Z",
    "2026-01-01T00:60:00Z", "2026-01-01T00:00:61Z", "2026-01-01T00:00:00.Z", "2026-01-01T00:00:00+0000",
    "2026-01-01T00:00:00+24:00", "2026-01-01T00:00:00+00:60", "2026-01-01T00:00:00 Z", "2026-01-01T00:00:00Zx",
    "+026-01-01T00:00:00Z", "2026-1 -01T00:00:00Z", "٢026-01-01T00:00:00Z", "0000-01-01T00:00:00Z",
    "2026-01-01X00:00:00Z",
    "2026/01-01T00:00:00Z", "2026-01-01T00:00.00Z", "2026-01-01T00:00:00.1_0Z",
])
def test_what_is_no_time_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(ValueError, match="is no time; write it like 2026-12-01T22:00:00Z"):
        c.parse_time(text)


def test_times_agree_with_the_standard_library_over_many_centuries():
    rng = random.Random(4)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    for _ in range(3000):
        micros = rng.randrange(-62_135_596_800_000_000, 253_402_300_800_000_000)
        micros -= micros % 1000 if rng.random() < 0.5 else 0
        moment = epoch + datetime.timedelta(microseconds=micros)
        unix_s = micros / 1_000_000
        assert c.parse_time(moment.isoformat()) == pytest.approx(unix_s, abs=1e-4)
        if abs(unix_s) < 4e9:  # beyond that a float has no exact microseconds
            assert c.format_db_time(unix_s) == moment.strftime("%Y-%m-%d %H:%M:%S.%f+00:00")
            assert c.format_time(unix_s) == moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"
            assert c.parse_db_time(c.format_db_time(unix_s)) == pytest.approx(unix_s, abs=1e-6)


@pytest.mark.slow
def test_every_day_of_five_centuries_goes_to_its_number_and_back():
    day, number = datetime.date(1800, 1, 1), (datetime.date(1800, 1, 1) - datetime.date(1970, 1, 1)).days
    while day.year < 2300:
        assert c.days_from_civil(day.year, day.month, day.day) == number
        assert c.civil_from_days(number) == (day.year, day.month, day.day)
        day, number = day + datetime.timedelta(1), number + 1


def test_column_times_sort_as_text_and_round_up_into_the_next_second():
    assert c.format_db_time(0.9999999) == "1970-01-01 00:00:01.000000+00:00"
    times = sorted(random.Random(5).uniform(0, 4e9) for _ in range(300))
    assert [c.format_db_time(at) for at in times] == sorted(c.format_db_time(at) for at in times)


def test_no_time_stays_no_time():
    assert c.format_time(None) is None and c.format_db_time(None) is None
    for text in (None, "", "0001-01-01 00:00:00+00:00", "0001-01-01T00:00:00Z", "yesterday"):
        assert c.parse_db_time(text) is None
    assert c.parse_db_time("1970-01-01 00:00:05+00:00") == 5.0


# Identifiers and suggestions


def test_an_identifier_is_a_version_4_uuid_of_the_given_bytes():
    for seed in range(50):
        raw = random.Random(seed).randbytes(16)
        assert c.format_uuid(raw) == str(uuid.UUID(bytes=raw, version=4))
    assert c.format_uuid(b"\xff" * 20) == "ffffffff-ffff-4fff-bfff-ffffffffffff"


@pytest.mark.parametrize("word, meant", [
    ("naem", "name"), ("timout", "timeout"), ("max-attempts", "max_attempts"), ("TIMEOUT", "timeout"), ("zzz", None),
    ("", None),
])
def test_the_nearest_known_word_is_found_or_none(word, meant):
    known = ("name", "timeout", "max_attempts", "tags")
    assert c.nearest(word, known) == meant
    assert c.did_you_mean(word, known) == (f" (did you mean {meant!r}?)" if meant else "")


# Cost


def test_importing_the_program_imports_nothing_slow():
    code = ("import os, sys, time; before = set(sys.modules); import claudomator; "
            "print(*sorted(set(sys.modules) - before - {'claudomator', '__future__', '_json'}))")
    folder = c.__file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, timeout=20)
    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize("text", ['{"a" 1}', '{\\"a\\": 1}', '["\x01"]', '"abc', '{"a":1,}', "nul", "[1,", "NaN"])
def test_bad_json_is_a_value_error_also_where_nobody_has_imported_json(text):
    """The C scanner takes its exception from a module that pytest has long imported and the daemon has not."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import claudomator as c\nassert 'json' not in sys.modules\n" \
        "try: c.parse_json(sys.argv[2])\nexcept ValueError: sys.exit(7)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, str(pathlib.Path(c.__file__).parent), text])
    assert done.returncode == 7
