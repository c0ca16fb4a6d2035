"""Values that nobody expects where they stand."""

from hypothesis import strategies as st

# As YAML text, so that nothing is lost between here and the file.
YAML_VALUES = (
    *("null", "true", "false", '""', "text", "''", "~", "yes", "-", "0", "-1", "1", "2", "0.0"),
    *("0.5", "-0.5", "1.5", "1e30", "-1e30", "1e400", ".inf", "-.inf", ".nan", "1_000", "1_"),
    *("0x10", "99999999999999999999", "9" * 5000, "1" * 400, "2026-11-21", "12:30:45", "1:2"),
    *("[]", "[1]", "[1, 2]", "[2, 1]", "[1, 2, 3]", "[-1, 0]", "[0.5, .inf]", "[null]"),
    *('["a", "b"]', "[[1], [2]]", "{}", "{a: 1}", "{name: x}", "{name: [1]}", "{name: null}"),
    *("{0: 1}", "{1: {2: {3: 4}}}", '"\\0"', '"\\n"', '"\\ud800"', '"%s {0} $HOME"', "日本語"),
    *('"' + "long " * 400 + '"', "[" * 40 + "]" * 40, "{a: " * 40 + "1" + "}" * 40),
    *("!!int 1", "!!python/name:os.system x", "&a 1", "*a", "<<", "|\n    block", "@", "`", "%"),
    *("[1", "{a", '"open', "? 1"),
)
STRANGE_NUMBERS = (10**400, -(10**400), 2**31, 2**63, 2**64, -1, 0, 1e308)
STRANGE_TEXTS = ("1", "1.5", "\0", "..")

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(STRANGE_NUMBERS + STRANGE_TEXTS)
)
# Whatever a JSON can hold.
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
DEEP = b"[" * 100_000
LONG_NUMBER = b"9" * 5000
