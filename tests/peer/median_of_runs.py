#!/usr/bin/env python3
"""For each case the row of several runs whose time is the median, of an even number of runs the faster of the middle two: rows of one
process share a luck of 0.1 to 0.2 us, so short ones are judged by several processes (docs/performance.md, "Few tokens").

    median_of_runs.py RUN.jsonl RUN.jsonl ... > MEDIAN.jsonl
"""

import json
import sys


def rows(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.startswith('{')]


def main():
    runs = {}
    for path in sys.argv[1:]:
        for row in rows(path):
            runs.setdefault((row['op'], row['case']), []).append(row)
    for found in runs.values():
        timed = sorted((row for row in found if row.get('us')), key=lambda row: row['us'])
        print(json.dumps(timed[(len(timed) - 1) // 2] if timed else found[0], separators=(',', ':')))


if __name__ == '__main__':
    main()
