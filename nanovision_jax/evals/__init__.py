"""Benchmarks, one a file: each has a run(...) that gives a result to write to RUN/eval/<task>.json."""


def told_counts(counts):
    """{what: how many} as '3 × this, 1 × that'."""
    return ', '.join(f'{count:,} × {what}' for what, count in counts.items())


def coverage(result):
    """How much of what was asked a result is about, in a sentence; '' for a result of before this was counted."""
    if 'asked' not in result:
        return ''
    told = f'asked {result["asked"]:,}, answered {result["n"]:,}, left out {result["asked"] - result["n"]:,}'
    told += f' ({told_counts(result["left_out"])})' if result['left_out'] else ''
    return told + (f'; not counted: {told_counts(result["other"])}' if result['other'] else '')
