"""usbredir.filter against the records of the original library, a model written from the C sources' rules, and libc."""

from __future__ import annotations

import ctypes
import json
import pickle
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir import filter as filters
from usbredir.errors import FilterSyntaxError, UsbRedirError
from usbredir.filter import DeviceIds, FilterResult, FilterRule, check, describe, parse

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text(encoding="utf-8"))
COMPARED: dict[str, int] = {}

RESULTS = {"0": FilterResult.ALLOW, "-EPERM": FilterResult.DENY, "-ENOENT": FilterResult.NO_MATCH}
ANY_RULE = FilterRule(-1, -1, -1, -1, True)


def records(name: str) -> pytest.MarkDecorator:
    """One test per record of a list."""
    COMPARED[name] = len(VECTORS[name])
    return pytest.mark.parametrize("record", [pytest.param(record, id=record["id"]) for record in VECTORS[name]])


def rules_of(record: dict[str, Any]) -> list[FilterRule]:
    return [FilterRule(*rule) for rule in record["rules"]]


def device_of(record: dict[str, Any]) -> DeviceIds:
    return DeviceIds(*(record[name] for name in DeviceIds._fields))


# ---------------------------------------------------------------- records


def test_all_records_are_compared() -> None:
    """No list about filters is left out or cut short."""
    assert {n: count for n, count in VECTORS["meta"]["counts"].items() if n.startswith("filter_")} == COMPARED


@records("filter_parse")
def test_parse_record(record: dict[str, Any]) -> None:
    """Same rules, or an error, as in C; written out again they give C's text."""
    arguments = (record["string"], record["token_sep"], record["rule_sep"])
    if record["rc"] != "0":
        assert record["rc"] == "-EINVAL"
        with pytest.raises(FilterSyntaxError):
            parse(*arguments)
        return
    rules = parse(*arguments)
    assert [list(rule) for rule in rules] == [[*rule[:4], rule[4] != 0] for rule in record["rules"]]
    assert all(type(rule.allow) is bool for rule in rules)
    assert len(rules) == record["count"]
    assert filters.format(rules, *arguments[1:]) == record["to_string"]


@records("filter_to_string")
def test_format_record(record: dict[str, Any]) -> None:
    """Same text as in C, or ValueError where C gives NULL."""
    arguments = (rules_of(record), record["token_sep"], record["rule_sep"])
    if record["to_string"] is None:
        with pytest.raises(ValueError, match=r"empty|neither"):
            filters.format(*arguments)
    else:
        assert filters.format(*arguments) == record["to_string"]


@records("filter_print")
def test_describe_record(record: dict[str, Any]) -> None:
    """Same table as in C."""
    assert describe(rules_of(record)) == record["text"]


@records("filter_check")
def test_check_record(record: dict[str, Any]) -> None:
    """Same answer as in C."""
    flags = {"default_allow": bool(record["flags"] & 1), "dont_skip_non_boot_hid": bool(record["flags"] & 2)}
    assert len(record["interfaces"]) == max(0, record["interface_count"])
    if record["rc"] == "-EINVAL":
        with pytest.raises(ValueError, match="neither"):
            check(rules_of(record), device_of(record), **flags)
    else:
        assert check(rules_of(record), device_of(record), **flags) is RESULTS[record["rc"]]


# ---------------------------------------------------------------- a model, in the words of the specification

INT64_MAX = 2**63 - 1
DIGITS = "0123456789abcdef"


def strtol(token: str) -> int | None:
    """strtol(token, &end, 0) if it ends at the end of the token."""
    rest = token.lstrip(" \t\n\v\f\r")
    negative = rest[:1] == "-"
    rest = rest[1:] if rest[:1] in ("-", "+") and rest else rest
    base = 10
    if rest[:2] in ("0x", "0X"):
        base, rest = 16, rest[2:]
    elif rest[:1] == "0":
        base = 8
    value = 0
    for character in rest:
        if character.isascii() and character.lower() in DIGITS[:base]:
            value = value * base + DIGITS.index(character.lower())
        else:
            return None
    if not rest:
        return None
    return max(-value, -INT64_MAX - 1) if negative else min(value, INT64_MAX)


def split(text: str, separators: str) -> list[str]:
    """The pieces strtok() finds."""
    pieces = [""]
    for character in text:
        if character in separators:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]


def model_rule(piece: str, token_sep: str) -> FilterRule | None:
    numbers = [strtol(token) for token in split(piece, token_sep)]
    if len(numbers) != 5 or None in numbers:
        return None
    device_class, vendor, product, version, allow = (ctypes.c_int32(number or 0).value for number in numbers)
    if not -1 <= device_class <= 0xFF or not all(-1 <= field <= 0xFFFF for field in (vendor, product, version)):
        return None
    return FilterRule(device_class, vendor, product, version, allow != 0)


def model_parse(text: str, token_sep: str, rule_sep: str) -> list[FilterRule] | None:
    token_sep, rule_sep, text = (each.split("\0")[0] for each in (token_sep, rule_sep, text))
    if not token_sep or not rule_sep:
        return None
    rules: list[FilterRule] = []
    for piece in split(text, rule_sep):
        rule = model_rule(piece, token_sep)
        if rule is None:
            return None
        rules.append(rule)
    return rules


def model_match(rules: Sequence[FilterRule], device: DeviceIds, device_class: int, default_allow: bool) -> FilterResult:
    wanted = (device_class, device.vendor_id, device.product_id, device.device_version_bcd)
    for rule in rules:
        if all(have in (-1, want) for have, want in zip(rule[:4], wanted, strict=True)):
            return FilterResult.ALLOW if rule.allow else FilterResult.DENY
    return FilterResult.ALLOW if default_allow else FilterResult.NO_MATCH


def model_check(rules: Sequence[FilterRule], device: DeviceIds, default_allow: bool, all_hid: bool) -> FilterResult:
    """Steps 2 to 5, the repetition of step 4 included."""
    if device.device_class not in (0x00, 0xEF):
        result = model_match(rules, device, device.device_class, default_allow)
        if result is not FilterResult.ALLOW:
            return result
    skipped = 0
    for interface in device.interfaces:
        if not all_hid and len(device.interfaces) > 1 and interface == (3, 0, 0):
            skipped += 1
            continue
        result = model_match(rules, device, interface[0], default_allow)
        if result is not FilterResult.ALLOW:
            return result
    if device.interfaces and skipped == len(device.interfaces):
        return model_check(rules, device, default_allow, True)
    return FilterResult.ALLOW


# ---------------------------------------------------------------- properties

fields16 = st.integers(-1, 0xFFFF)
rules = st.builds(FilterRule, st.integers(-1, 0xFF), fields16, fields16, fields16, st.booleans())
few_ids = st.integers(-1, 2)
few_rules = st.builds(FilterRule, st.sampled_from([-1, 0, 3, 8, 9, 0xEF]), few_ids, few_ids, few_ids, st.booleans())
devices = st.builds(
    DeviceIds,
    st.sampled_from([0, 3, 8, 9, 0xEF]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 2),
    st.lists(st.sampled_from([(3, 0, 0), (3, 1, 1), (3, 0, 1), (3, 1, 0), (8, 6, 80), (0, 0, 0)]), max_size=4),
)
odd_numbers = ["0", "-1", "0x03", "010", "08", "0x", "+5", "\t7", "7\t", "\v-1", "0XfF", "-0", "-", "+", "0b1", "1_0"]
long_numbers = st.builds(lambda high, low: (high << 32) + low, st.integers(-(2**34), 2**34), st.integers(-1, 0x101))
numbers = st.sampled_from(odd_numbers) | (long_numbers | st.integers(-3, 70_000)).flatmap(
    lambda n: st.sampled_from([str(n), hex(n), oct(n).replace("o", ""), f"+{n}", f" {n}", f"{n} "])
)
separators = st.text(st.sampled_from(",|:;x- \t]^[\\0é\0"), max_size=3)
safe_separators = st.text(st.sampled_from(",|:;/ ]^[\\é\U0001f50c"), min_size=1, max_size=3)


@st.composite
def nearly_filters(draw: st.DrawFn) -> str:
    """Texts that mostly are filters: five numbers per rule, with separators here and there."""
    five = st.lists(numbers, min_size=5, max_size=5)
    pieces = draw(st.lists(five | st.lists(numbers, min_size=4, max_size=6), max_size=4))
    rule_sep = draw(st.sampled_from(["|", "||", "|,|", "\0|"]))
    return rule_sep.join([draw(st.sampled_from([",", ",,"])).join(piece) for piece in pieces])


texts = nearly_filters() | st.text(st.sampled_from(",|-+01379xXaF \t\n\v\0Zé٣_"), max_size=40) | st.text(max_size=20)


def outcome(text: str, token_sep: str, rule_sep: str) -> list[FilterRule] | None:
    """Rules, or None for a syntax error; anything else is a failure of the test."""
    try:
        return parse(text, token_sep, rule_sep)
    except FilterSyntaxError as error:
        return None if 0 <= error.position <= len(text) else pytest.fail(f"position {error.position}")


@given(texts)
def test_parse_answers_like_the_model(text: str) -> None:
    """Any text gives the model's rules or FilterSyntaxError."""
    assert outcome(text, ",", "|") == model_parse(text, ",", "|")


@given(texts, separators, separators)
def test_separators_answer_like_the_model(text: str, token_sep: str, rule_sep: str) -> None:
    """So do any sets of separators, also ones that overlap each other or the numbers."""
    assert outcome(text, token_sep, rule_sep) == model_parse(text, token_sep, rule_sep)


@given(st.lists(rules))
def test_round_trip(some: list[FilterRule]) -> None:
    """What format writes, parse reads."""
    text = filters.format(some)
    assert parse(text) == some
    assert filters.format(parse(text)) == text


@given(st.lists(rules), safe_separators, safe_separators)
def test_round_trip_with_separators(some: list[FilterRule], token_sep: str, rule_sep: str) -> None:
    """With any separators whose first characters are not in the other set."""
    text = filters.format(some, token_sep, rule_sep)
    if token_sep[0] not in rule_sep and rule_sep[0] not in token_sep:
        assert parse(text, token_sep, rule_sep) == some
    else:
        assert outcome(text, token_sep, rule_sep) == model_parse(text, token_sep, rule_sep)


@given(st.lists(few_rules, max_size=4), devices, st.booleans(), st.booleans())
@settings(max_examples=400)
def test_check_answers_like_the_model(some: list[FilterRule], device: DeviceIds, default: bool, all_hid: bool) -> None:
    """Any rules, device and flags."""
    answer = check(some, device, default_allow=default, dont_skip_non_boot_hid=all_hid)
    assert answer is model_check(some, device, default, all_hid)


@given(st.lists(rules))
def test_describe_has_one_line_per_rule(some: list[FilterRule]) -> None:
    """A line says what a rule does, as the text of the rule says it."""
    line = re.compile(r"Class (.{3}) ID (.{4}):(.{4}) Version (\d{2,3}| \d|  ANY)(?:\.\d{2,3})? (Allow|Block)")
    found = [line.fullmatch(each) for each in describe(some).splitlines()]
    columns = [match.group(1, 2, 3, 5) for match in found if match is not None]
    words = {"-1": "ANY", "0": "Block", "1": "Allow"}
    fields = [rule.split(",") for rule in filters.format(some).split("|") if rule]
    expected = [[words.get(field, field[2:]) for field in (*rule[:3], rule[4])] for rule in fields]
    assert [[column.strip() for column in each] for each in columns] == expected


@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**32, reason="the reference is strtol with a 64-bit long")
@given(numbers | st.text(st.sampled_from("-+0123789xXabfF \t\n\v"), max_size=24))
def test_numbers_answer_like_libc(token: str) -> None:
    """A field is what strtol of the system's C library makes of it."""
    libc = ctypes.CDLL(None)
    libc.strtol.restype = ctypes.c_long
    end = ctypes.c_char_p()
    value = libc.strtol(ctypes.c_char_p(token.encode()), ctypes.byref(end), 0)
    expected = None
    if token and end.value == b"" and value & 0xFFFFFFFF in {*range(0x10000), 0xFFFFFFFF}:
        expected = [FilterRule(-1, ctypes.c_int32(value).value, -1, -1, True)]
    assert outcome(f"-1,{token},-1,-1,1", ",", "|") == expected


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x1000000000000003", 3),
        ("0x7fffffff00000003", 3),
        ("0x8000000000000003", -1),
        ("4611686018427387907", 3),
        ("9223372032559808515", 3),
        ("9223372036854775811", -1),
        ("0400000000000000000003", 3),
        ("0777777777740000000003", 3),
        ("01000000000000000000003", -1),
        ("-9223372036854775805", 3),
        ("-9223372036854775808", 0),
        ("-9223372036854775807", 1),
        ("-9223372036854775811", 0),
        ("-0x8000000000000003", 0),
    ],
)
def test_numbers_around_64_bits(text: str, value: int) -> None:
    """Saturated to 64 bits, then cut to 32."""
    assert parse(f"-1,{text},-1,-1,1") == model_parse(f"-1,{text},-1,-1,1", ",", "|")
    assert parse(f"-1,{text},-1,-1,1")[0].vendor_id == value


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("x", 0),
        ("|||x", 3),
        ("3,-1,-1,-1,0|x|y", 13),
        ("3,-1,-1,-1,0||,3,-1,-1,-1,|", 14),
        ("-1,-1,-1,-1,1|256,-1,-1,-1,1", 14),
        ("-1,-1,-1,-1,1|1,-1,-1,-1,é", 14),
    ],
)
def test_position_is_the_index_of_the_wrong_rule(text: str, position: int) -> None:
    """The error leads to the first wrong rule."""
    with pytest.raises(FilterSyntaxError, match=f"character {position} ") as caught:
        parse(text)
    assert caught.value.position == position
    assert isinstance(caught.value, (ValueError, UsbRedirError))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,1,1,1", "five fields"),
        ("3,1,1,1,1,1", "five fields"),
        ("any,1,1,1,1", "device_class is not a number"),
        ("1,1,1,1,yes", "allow is not a number"),
        ("256,1,1,1,1", r"device_class is neither -1 \(any\) nor 0 to 255"),
        ("1,1,-2,1,1", r"product_id is neither -1 \(any\) nor 0 to 65535"),
    ],
)
def test_error_says_what_is_wrong(text: str, message: str) -> None:
    """The message names the field and the rule for it."""
    with pytest.raises(FilterSyntaxError, match=message):
        parse(text)


@pytest.mark.parametrize(("token_sep", "rule_sep"), [("", "|"), (",", ""), ("", ""), ("\0,", "|"), (",", "\0|")])
def test_empty_sets_of_separators_are_refused(token_sep: str, rule_sep: str) -> None:
    """There are no built-in defaults, and a C string ends at NUL."""
    with pytest.raises(FilterSyntaxError, match="separators must not be empty"):
        parse("", token_sep, rule_sep)
    with pytest.raises(ValueError, match="separators must not be empty"):
        filters.format([], token_sep, rule_sep)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", [-2, 0x10000, 2**70, -(2**70)])
def test_rules_out_of_range_are_refused(index: int, value: int) -> None:
    """format and check verify every rule, also one that would not be reached."""
    fields: list[int] = [-1, -1, -1, -1, 1]
    fields[index] = value
    bad = [ANY_RULE, FilterRule._make(fields)]
    message = f"rule 1: {FilterRule._fields[index]} "
    with pytest.raises(ValueError, match=message):
        filters.format(bad)
    with pytest.raises(ValueError, match=message):
        check(bad, DeviceIds(0, 0, 0, 1, 2, 3, []))


# ---------------------------------------------------------------- what C has no word for


def test_only_allow_is_true() -> None:
    """``if check(...)`` means what it says."""
    assert {result: bool(result) for result in FilterResult} == {
        FilterResult.ALLOW: True,
        FilterResult.DENY: False,
        FilterResult.NO_MATCH: False,
    }
    assert pickle.loads(pickle.dumps(FilterResult.DENY)) is FilterResult.DENY


@pytest.mark.parametrize("allow", [True, 1, 2, -1, 2**40])
def test_any_number_but_zero_allows(allow: int) -> None:
    """Rules made by hand may have C's int in *allow*."""
    rule = FilterRule._make([8, -1, -1, -1, allow])
    assert filters.format([rule]) == "0x08,-1,-1,-1,1"
    assert check([rule], DeviceIds(8, 0, 0, 1, 2, 3, ())) is FilterResult.ALLOW
    assert describe([rule]).endswith("Allow\n")


def test_rules_may_come_from_an_iterator() -> None:
    """Every function takes any iterable of rules."""

    def some() -> Iterator[FilterRule]:
        yield ANY_RULE

    assert filters.format(some()) == "-1,-1,-1,-1,1"
    assert describe(some()) == "Class ANY ID  ANY: ANY Version   ANY Allow\n"
    assert check(some(), DeviceIds(9, 0, 0, 1, 2, 3, [(3, 0, 0), (3, 0, 0)]))


def test_interfaces_may_be_lists() -> None:
    """The HID test does not depend on the type of the sequence."""
    block_hid = [FilterRule(3, -1, -1, -1, False), ANY_RULE]
    interfaces: Any = [[1, 1, 0], [3, 0, 0]]
    assert check(block_hid, DeviceIds(0, 0, 0, 1, 2, 3, interfaces)) is FilterResult.ALLOW


def test_describe_shows_rules_that_are_out_of_range() -> None:
    """It is for looking at rules, so it refuses none."""
    line = describe([FilterRule(-2, 0x12345, -3, 0x10000, False)])
    assert line == "Class  fffffffe ID 12345:fffffffd Version  0.00 Block\n"


# ---------------------------------------------------------------- hostile texts

MANY = 1_000_000

HOSTILE = {
    "rule separators": ("|" * MANY, 0),
    "token separators": ("," * MANY, None),
    "NULs": ("\0" * MANY, 0),
    "one long number": ("1" * MANY, None),
    "long number in every field": (",".join(["-" + "9" * MANY] * 5), 1),
    "leading zeros": ("0" * MANY + ",-1,-1,-1,1", 1),
    "long hexadecimal": ("-1," * 4 + "0x" + "f" * MANY, 1),
    "long hexadecimal, wrong": ("-1," * 4 + "0x" + "f" * MANY + "g", None),
    "long octal": ("-1," * 4 + "0" + "7" * MANY, 1),
    "spaces": (" " * MANY, None),
    "spaces before every number": (",".join([" " * MANY + "1"] * 5), 1),
    "spaces instead of numbers": (",".join([" " * MANY] * 5), None),
    "too many fields": ("1," * MANY, None),
    "fields far apart": (("," * MANY).join("11111") + "," * MANY, 1),
    "fields far apart, one too many": (("," * MANY).join("111111") + "," * MANY, None),
    "signs": ("-" * MANY, None),
    "many rules": ("1,1,1,1,1|" * (MANY // 10), MANY // 10),
    "many rules, the last one wrong": ("1,1,1,1,1|" * (MANY // 10) + "x", None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_linear_time(name: str) -> None:
    """No input takes more than time in proportion to its length (a second is ample, quadratic would be hours)."""
    text, count = HOSTILE[name]
    start = time.process_time()
    result = outcome(text, ",", "|")
    assert time.process_time() - start < 20
    assert (None if result is None else len(result)) == count


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs tracemalloc")
@pytest.mark.parametrize("text", ["|" * MANY, "," * MANY, "1," * MANY, "|," * MANY])
def test_separators_take_no_memory(text: str) -> None:
    """Empty rules and fields are not collected before they are dropped."""
    import tracemalloc

    outcome("1,1,1,1,1", ",", "|")
    tracemalloc.start()
    try:
        outcome(text, ",", "|")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_long_numbers_are_not_kept() -> None:
    """The cache of numbers must not hold what a peer sent."""
    before = filters._short_number.cache_info().currsize
    parse(",".join(["0" * 1000 + str(i) for i in range(5)]))
    assert filters._short_number.cache_info().currsize == before
    assert filters._short_number.cache_info().maxsize == 1024
