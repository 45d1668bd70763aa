"""What every results file of the benchmark says before its rows, made up for tests."""

HEADER = {
    "date": "2026-01-02T03:04:05+00:00",
    "notes": ["page faults taken out"],
    "machine": {"cpu": "a CPU", "gpu": None, "threads": 2, "isa": "avx2"},
    "software": {"torch": "2.13.0"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
}
