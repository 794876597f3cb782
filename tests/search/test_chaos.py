"""A short run of `benchmarks/chaos.py`: kills at exact and at random points of the journal, kills of every part of Ray, and a fuzzed journal."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_short_chaos(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(script),
        "--driver",
        "16",
        "--ray",
        "4",
        "--fuzz",
        "300",
        "--seed",
        "5",
        "--out",
        str(out),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    driver = result["driver"]
    assert driver["kills"] == 16
    assert driver["evaluations_lost"] == driver["evaluations_paid_twice"] == 0
    assert driver["runs_with_the_same_trajectory"] == driver["runs_with_the_same_front_file"] == driver["runs"]
    ray = result["ray"]
    assert ray["kinds"] == dict.fromkeys(("worker", "raylet", "driver", "head"), 1)
    assert ray["evaluations_lost"] == ray["evaluations_paid_twice"] == 0
    assert ray["runs_with_the_same_trajectory"] == 1
    assert not [outcome for outcome in result["fuzz"]["outcomes"] if outcome.startswith("SILENTLY")]
