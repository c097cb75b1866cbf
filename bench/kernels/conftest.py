"""Collects the figures of a run into one JSON file under bench/results."""

import json
import re

import pytest

from bench import provenance

RESULTS = []


@pytest.fixture
def record(request):
    """record(**figures): one line of the results, named after its test."""
    return lambda **figures: RESULTS.append({"name": request.node.name, **figures})


def pytest_sessionfinish():
    if RESULTS:
        keep(provenance.header(), RESULTS)


def keep(header, rows):
    """Write the file of this device, day and commit; a run of some benchmarks replaces their rows there alone."""
    name = re.sub(r"[^a-z0-9]+", "-", f"kernels {header['device']} {header['date'][:10]} {header['commit']}".lower())
    path = provenance.RESULTS / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text())
        rows = list({row["name"]: row for row in [*before["results"], *rows]}.values())
        header["command"] = "; ".join(dict.fromkeys([*before["command"].split("; "), header["command"]]))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**header, "results": rows}, indent=1) + "\n")
    return path
