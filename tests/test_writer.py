"""What a run writes down beside its results."""

import json

from psp_jax.report.writer import Skips


def test_a_run_deletes_later_skips_of_all_its_processes(tmp_path, capsys):
    """There were two processes; now one continues at example 10 and reads the examples of both."""
    for name, positions in (('skipped', (2, 8, 12)), ('skipped-1', (5, 11))):
        lines = [json.dumps({'position': p, 'error': f'picture {p}'}) for p in positions]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines) + '\n{"posi')
    skips = Skips(str(tmp_path), 10)
    skips.add(11, 'picture 11')
    assert capsys.readouterr().err == 'skipped example 3 of this process: picture 11\n'
    found = {
        path.name: [json.loads(line)['position'] for line in path.read_text().splitlines()]
        for path in tmp_path.iterdir()
    }
    assert found == {'skipped.jsonl': [2, 8, 11], 'skipped-1.jsonl': [5]}
