"""The masks of a real model are what they were; skipped where it is absent."""

from __future__ import annotations

import golden_masks
import pytest

pytestmark = pytest.mark.skipif(
    not (golden_masks.MODEL / "config.json").exists(),
    reason="the real models are not here: benchmarks/real_models.py --small fetches them",
)


@pytest.fixture(scope="module")
def dense():
    return golden_masks.load()


def test_masks_of_committed_norms(dense):
    norms, masks = golden_masks.stored()
    assert len(norms) == 7 * len(golden_masks.BLOCKS)
    for name, norm in norms.items():
        weight = dense.get_submodule(name).weight
        found = {
            pattern: golden_masks.hash_of(golden_masks.mask(weight, norm, pattern))
            for pattern in golden_masks.PATTERNS
        }
        assert found == masks[name], name


def test_masks_from_text(dense):
    """Calibration computes in bf16, on other processors by other roundings: nearly all bits."""
    norms, _ = golden_masks.stored()
    found = golden_masks.norms_from_text(golden_masks.load())
    for name, norm in norms.items():
        weight = dense.get_submodule(name).weight
        before, now = (golden_masks.mask(weight, one, "2:4") for one in (norm, found[name]))
        assert (before == now).float().mean() >= 0.998, name
