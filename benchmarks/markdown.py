"""Puts the tables of benchmarks into the pages of docs/."""

import re


def with_table(text: str, heading: str, table: str) -> str:
    """The Markdown `text` with the table below `heading` (such as '## Results') replaced."""
    place = f'(?m)^({re.escape(heading)}\n\n)(?:\\|.*\n)*\n*'
    text, found = re.subn(place, lambda match: f'{match[1]}{table}\n\n', text)
    assert found == 1, f'there must be one heading {heading!r}'
    return text.rstrip() + '\n'
