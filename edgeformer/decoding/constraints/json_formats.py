"""Formats of strings in JSON Schema that the grammar enforces; all others are refused.

llguidance has an expression for each of `ENFORCED`. Some of them accept too much; `STRICTER` has patterns (all must
fit) that close the gap.
"""

from __future__ import annotations

ENFORCED = frozenset(["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])

_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAY = (
    r"(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_YEAR = r"^(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])-"  # there is no year 0000
# RFC 3339, section 5.6, without leap seconds: which minutes have one is no matter of a grammar.
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*"  # no "--": "xn--" marks Punycode, which is no regular language

STRICTER: dict[str, tuple[str, ...]] = {
    "date": (rf"^{_DAY}$", _YEAR),
    "time": (rf"^{_TIME}$",),
    "date-time": (rf"^{_DAY}[Tt]{_TIME}$", _YEAR),
    "hostname": (rf"^{_LABEL}(?:\.{_LABEL})*$",),
}
