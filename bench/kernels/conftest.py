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
    if not RESULTS:
        return
    header = provenance.header()
    name = re.sub(r"[^a-z0-9]+", "-", f"kernels {header['device']} {header['date'][:10]}".lower())
    path = provenance.RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**header, "results": RESULTS}, indent=1) + "\n")
