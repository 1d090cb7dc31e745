"""What `benchmarks/accuracy.py` adds of its own to the package's scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

accuracy = pytest.importorskip("accuracy")


def test_the_largest_part_is_kept_whatever_its_classes():
    classes = np.zeros((6, 6, 6), np.uint8)
    classes[0, 0, :3] = 1
    # touches the row by a corner alone
    classes[1, 1, 3] = 2
    classes[4:, 4, 4] = 3
    kept = accuracy.largest_part(classes)
    assert kept[4:].sum() == 0
    np.testing.assert_array_equal(kept[:4], classes[:4])
    np.testing.assert_array_equal(accuracy.largest_part(kept), kept)
    assert not accuracy.largest_part(np.zeros_like(classes)).any()


def test_weights_alone_keep_the_plain_network_of_their_cases(monkeypatch):
    """Neither rows of other weights nor those of another commit are taken for theirs."""
    def evaluate(data: Path, run: Path) -> dict:
        scored.append(run)
        return {"a": {"rows": {"S+Q": "new"}, "decisions": {}}}

    scored, asked = [], (Path("brats2021"), Path("data"))
    monkeypatch.setattr(accuracy, "evaluate_run", evaluate)
    monkeypatch.setattr(accuracy, "commit", lambda: "abc")
    rows = {"S+Q": "old", "whole": "old", "static": "plain"}
    known = {"a": {"run": "fold0", "weights_sha256": "12", "commit": "older", "rows": rows}}
    first = accuracy.cases_of(*asked, known)
    assert first["a"]["rows"] == {"S+Q": "new", "static": "plain"}
    assert first["a"]["run"] == "brats2021" and len(first["a"]["weights_sha256"]) == 64
    assert first["a"]["static_of"] == {"run": "fold0", "weights_sha256": "12", "commit": "older"}
    assert accuracy.cases_of(*asked, first) == first and len(scored) == 1
    # what has changed since may be anything
    monkeypatch.setattr(accuracy, "commit", lambda: "abc-dirty")
    dirty = accuracy.cases_of(*asked, first)
    assert accuracy.cases_of(*asked, dirty) == dirty and len(scored) == 3
    assert dirty["a"]["static_of"] == first["a"]["static_of"]
