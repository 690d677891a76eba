"""Records are those that they always were, bit by bit.

Other bits under equal keys are stale numbers in every cache there is. Where a change is meant, the
revision of what changed goes up (or `KEY_VERSION`), and the records are frozen anew::

    python tests/engine/test_golden.py
"""

from __future__ import annotations

import tempfile

import pytest

import golden
from feature_cache import FeatureCache
from golden import SCENES, read_golden

pytestmark = pytest.mark.filterwarnings("ignore:.*is constant:UserWarning")
CASES = [(name, kind) for name, scene in SCENES.items() for kind in scene.draws]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[", ".join(case) for case in CASES])
def test_records_are_what_they_were(cache: FeatureCache, name: str, kind: str) -> None:
    scene, draw = SCENES[name], SCENES[name].draws[kind]
    found = golden.digests(scene, draw, cache.get_or_compute)
    triples = zip(golden.spaces_of(draw), found, read_golden()[name][kind], strict=True)
    assert not {str(space): (now, before) for space, now, before in triples if now != before}


def test_every_case_is_frozen() -> None:
    frozen = [(name, kind) for name, kinds in read_golden().items() for kind in kinds]
    assert frozen == CASES


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden.write_golden(FeatureCache(folder).get_or_compute)
