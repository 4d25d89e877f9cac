"""Tables that benchmarks put into pages of docs/."""

import re


def with_table(text: str, heading: str, table: str) -> str:
    """Markdown with `table` below a heading, such as '## The figures', instead of the one there."""
    place = f'(?m)^({re.escape(heading)}\n\n)(?:\\|.*\n)*\n*'
    text, found = re.subn(place, lambda match: f'{match[1]}{table}\n\n', text)
    assert found == 1, f'there must be one heading {heading!r}'
    return text.rstrip() + '\n'
