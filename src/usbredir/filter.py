"""Filter rules: which devices may be redirected. Pure functions.

A filter is a list of rules, tried in order; the first that matches decides. As text a rule
is ``class,vendor,product,version,allow`` and rules are joined by ``|``; -1 matches anything::

    0x03,-1,-1,-1,0|-1,-1,-1,-1,1      no keyboards and mice, but everything else

Answers are those of the original's usbredirfilter on every input, oddities included (numbers
as C's strtol reads them on a 64-bit system, then cut to 32 bits). Separators are sets of
characters, also outside ASCII, where the original sees single bytes.

Threads: any.
Source: docs/protocol.md, filter; usbredirfilter.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from usbredir.errors import FilterSyntaxError

__all__ = ["DeviceIds", "FilterResult", "FilterRule", "check", "describe", "format", "parse"]

ANY = -1
"""Matches every value, in the first four fields of a rule."""

_CLASS_PER_INTERFACE = 0x00
_CLASS_MISCELLANEOUS = 0xEF
_NON_BOOT_HID = (3, 0, 0)

_INT64_MAX = 2**63 - 1
_INT64_MIN = -(2**63)

# What strtol accepts with base 0, all of it. ASCII only, so neither \s nor \d.
_NUMBER = r"[ \t\n\v\f\r]*([-+]?)(?:0[xX]([0-9a-fA-F]+)|([1-9][0-9]*)|(0[0-7]*))"
_SHORT = 16
"""Longest token worth remembering: the cache must not keep megabytes from a peer."""
_SURE_DIGITS = {16: 16, 10: 19, 8: 21}
"""Per base, the longest number without leading zeros that needs looking at: longer ones are 2**63 or more."""


class FilterRule(NamedTuple):
    """One rule. The first four fields must be equal to the device's; -1 is equal to anything."""

    device_class: int
    """Class of the device or of an interface, 0 to 255."""
    vendor_id: int
    """idVendor, 0 to 65535."""
    product_id: int
    """idProduct, 0 to 65535."""
    device_version_bcd: int
    """bcdDevice, 0 to 65535."""
    allow: bool
    """What happens to a device that matches."""


class DeviceIds(NamedTuple):
    """What a filter looks at in a device."""

    device_class: int
    device_subclass: int
    device_protocol: int
    vendor_id: int
    product_id: int
    device_version_bcd: int
    interfaces: Sequence[tuple[int, int, int]]
    """(class, subclass, protocol) of each interface."""


class FilterResult(Enum):
    """Answer of :func:`check`. Only ALLOW is true."""

    ALLOW = "allow"
    DENY = "deny"
    NO_MATCH = "no match"

    def __bool__(self) -> bool:
        return self is FilterResult.ALLOW


def parse(text: str, token_sep: str = ",", rule_sep: str = "|") -> list[FilterRule]:
    """Rules of a filter text. Takes time in proportion to the length of *text*.

    Empty rules and empty fields vanish, so separators may be repeated. The text ends at its
    first NUL. Numbers are decimal, ``0x`` hexadecimal or ``0`` octal, perhaps signed, perhaps
    with white space before (not behind) them.

    Args:
        text: the filter; empty or nothing but rule separators gives no rules.
        token_sep: characters that separate fields.
        rule_sep: characters that separate rules.

    Raises:
        FilterSyntaxError: *position* is the index of the first rule that is wrong.

    Source: usbredirfilter_string_to_rules().
    """
    separators = _cut(token_sep), _cut(rule_sep)
    if not all(separators):
        raise FilterSyntaxError("the sets of separators must not be empty")
    rules_of, fields_of = _patterns(*separators)
    end = text.find("\0")
    rules: list[FilterRule] = []
    for piece in rules_of.finditer(text, 0, len(text) if end < 0 else end):
        fields = fields_of.fullmatch(text, *piece.span())
        if fields is None:
            raise _syntax_error("does not have five fields", piece)
        numbers = [_number(token) for token in fields.groups()]
        rule = _rule(numbers)
        if rule is None:
            raise _syntax_error(_blame(numbers), piece)
        rules.append(rule)
    return rules


def format(rules: Iterable[FilterRule], token_sep: str = ",", rule_sep: str = "|") -> str:
    """Text of *rules*, joined by the first character of each set of separators.

    Raises:
        ValueError: a field is out of range, or a set of separators is empty.

    Source: usbredirfilter_rules_to_string().
    """
    separators = _cut(token_sep), _cut(rule_sep)
    if not all(separators):
        raise ValueError("the sets of separators must not be empty")
    token, rule = (characters[0] for characters in separators)
    return rule.join([_format_rule(each, token) for each in _verified(rules)])


def check(
    rules: Iterable[FilterRule],
    device: DeviceIds,
    *,
    default_allow: bool = False,
    dont_skip_non_boot_hid: bool = False,
) -> FilterResult:
    """Whether *rules* let *device* be redirected.

    The rules are applied to the device's class, unless that is 0x00 or 0xef (the interfaces say
    what it is), then to each interface's. The first answer other than ALLOW is the answer. So a
    device of class 0x00 or 0xef without interfaces is always allowed.

    Args:
        rules: tried in order, the first that matches decides.
        device: the device's numbers; subclass and protocol of the device play no part.
        default_allow: the answer when no rule matches is ALLOW, else NO_MATCH.
        dont_skip_non_boot_hid: look at every interface. Otherwise HID interfaces without boot
            protocol (the volume keys of a headset) are skipped when there are others.

    Raises:
        ValueError: a field of a rule is out of range.

    Source: usbredirfilter_check().
    """
    matching = [rule for rule in _verified(rules) if _matches_ids(rule, device)]
    for device_class in _classes(device, skip_non_boot_hid=not dont_skip_non_boot_hid):
        result = _first_match(matching, device_class, default_allow)
        if result is not FilterResult.ALLOW:
            return result
    return FilterResult.ALLOW


def describe(rules: Iterable[FilterRule]) -> str:
    """A table of *rules* for people, one line each. Source: usbredirfilter_print()."""
    return "".join([_describe_rule(rule) for rule in rules])


def _cut(characters: str) -> str:
    """*characters* as C sees them: up to the first NUL."""
    return characters.partition("\0")[0]


@lru_cache(maxsize=16)
def _patterns(token_sep: str, rule_sep: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of one rule within a text, and of the five fields within a rule.

    Neighbours in the second one have no character in common, so it takes linear time.
    """
    separator, token = f"[{re.escape(token_sep)}]", f"([^{re.escape(token_sep)}]+)"
    fields = f"{separator}*{f'{separator}+'.join([token] * 5)}{separator}*"
    return re.compile(f"[^{re.escape(rule_sep)}]+"), re.compile(fields)


def _number(token: str) -> int | None:
    """What C makes of *token*: strtol with base 0, cast to int. None if it is not a number."""
    return _short_number(token) if len(token) <= _SHORT else _any_number(token)


def _any_number(token: str) -> int | None:
    """A number of any length."""
    match = re.fullmatch(_NUMBER, token)
    if match is None:
        return None
    sign, hexadecimal, decimal, octal = match.groups()
    if decimal is not None:
        value = _saturated(decimal, 10)
    else:
        value = _saturated(octal, 8) if hexadecimal is None else _saturated(hexadecimal, 16)
    value = max(-value, _INT64_MIN) if sign == "-" else min(value, _INT64_MAX)
    return ((value + 0x8000_0000) & 0xFFFF_FFFF) - 0x8000_0000


_short_number = lru_cache(maxsize=1024)(_any_number)
"""Most fields of most rules are -1; to remember saves half of the time."""


def _saturated(digits: str, base: int) -> int:
    """Value of *digits*, or any number from 2**63 on. int() alone takes quadratic time, or refuses."""
    significant = digits.lstrip("0")
    if len(significant) > _SURE_DIGITS[base]:
        return 2 * _INT64_MAX
    return int(significant or "0", base)


def _rule(numbers: Sequence[int | None]) -> FilterRule | None:
    """The rule of five numbers, None if one is missing or out of range."""
    device_class, vendor, product, version, allow = numbers
    if device_class is None or vendor is None or product is None or version is None or allow is None:
        return None
    rule = FilterRule(device_class, vendor, product, version, allow != 0)
    return rule if _in_range(rule) else None


def _in_range(rule: FilterRule) -> bool:
    """Whether a rule may be used. Source: usbredirfilter_verify()."""
    device_class, vendor, product, version, _ = rule
    return -1 <= device_class <= 0xFF and -1 <= vendor <= 0xFFFF and -1 <= product <= 0xFFFF and -1 <= version <= 0xFFFF


def _verified(rules: Iterable[FilterRule]) -> list[FilterRule]:
    """*rules* as a list. Raises ValueError if a field is out of range."""
    result = list(rules)
    for index, rule in enumerate(result):
        if not _in_range(rule):
            raise ValueError(f"rule {index}: {_blame(rule)}")
    return result


def _blame(numbers: Sequence[int | None]) -> str:
    """What is wrong with a rule's fields."""
    for name, number in zip(FilterRule._fields, numbers, strict=True):
        maximum = 0xFF if name == "device_class" else 0xFFFF
        if number is None:
            return f"{name} is not a number"
        if name != "allow" and not -1 <= number <= maximum:
            return f"{name} is neither -1 (any) nor 0 to {maximum}"
    raise AssertionError("nothing is wrong with this rule")


def _syntax_error(what: str, piece: re.Match[str]) -> FilterSyntaxError:
    """Error for the rule found at *piece*. Does not quote it: it may be long, and come from a peer."""
    position = piece.start()
    return FilterSyntaxError(f"the rule at character {position} {what}", position=position)


def _format_rule(rule: FilterRule, separator: str) -> str:
    """Text of one rule."""
    device_class, vendor, product, version, allow = rule
    fields = [_hex(device_class, 2), _hex(vendor, 4), _hex(product, 4), _hex(version, 4), "1" if allow else "0"]
    return separator.join(fields)


def _hex(number: int, digits: int) -> str:
    """Text of one field."""
    return "-1" if number == ANY else f"0x{number:0{digits}x}"


def _classes(device: DeviceIds, *, skip_non_boot_hid: bool) -> list[int]:
    """The classes that the rules are applied to, in order."""
    interfaces = [tuple(interface) for interface in device.interfaces]
    if skip_non_boot_hid:
        # If nothing would be left, all of them count after all.
        interfaces = [interface for interface in interfaces if interface != _NON_BOOT_HID] or interfaces
    classes = [interface_class for interface_class, _, _ in interfaces]
    if device.device_class in (_CLASS_PER_INTERFACE, _CLASS_MISCELLANEOUS):
        return classes
    return [device.device_class, *classes]


def _matches_ids(rule: FilterRule, device: DeviceIds) -> bool:
    """Whether all but the class matches."""
    _, vendor, product, version, _ = rule
    return (
        vendor in (ANY, device.vendor_id)
        and product in (ANY, device.product_id)
        and version in (ANY, device.device_version_bcd)
    )


def _first_match(rules: Iterable[FilterRule], device_class: int, default_allow: bool) -> FilterResult:
    """Answer for one class."""
    for wanted, _, _, _, allow in rules:
        if wanted in (ANY, device_class):
            return FilterResult.ALLOW if allow else FilterResult.DENY
    return FilterResult.ALLOW if default_allow else FilterResult.NO_MATCH


def _describe_rule(rule: FilterRule) -> str:
    """One line of :func:`describe`."""
    device_class, vendor, product, version, allow = rule
    return (
        f"Class {_describe(device_class, ' {:02x}', 'ANY')}"
        f" ID {_describe(vendor, '{:04x}', ' ANY')}:{_describe(product, '{:04x}', ' ANY')}"
        f" Version {'  ANY' if version == ANY else _bcd(version)} {'Allow' if allow else 'Block'}\n"
    )


def _describe(number: int, template: str, anything: str) -> str:
    """A hexadecimal field, as 32 bits without sign, which shows also numbers that are out of range."""
    return anything if number == ANY else template.format(number & 0xFFFF_FFFF)


def _bcd(version: int) -> str:
    """A version number; digits above 9 count as their value."""
    high, middle, low, last = (version >> shift & 0xF for shift in (12, 8, 4, 0))
    return f"{high * 10 + middle:2d}.{low * 10 + last:02d}"
