"""Would the matrix of layouts see a bug? Each deliberate one is planted in the ranks, and must be seen."""

import pytest

from tests.policy.matrix import TOLERANCES, Pool, Reference, differences, live, settings_of
from tests.policy.mutations import MUTATIONS


@pytest.mark.long
@pytest.mark.parametrize("name", list(MUTATIONS))
def test_the_matrix_sees_a_planted_bug(pool: Pool, dense: Reference, sparse: Reference, name: str) -> None:
    mutation = MUTATIONS[name]
    expected = sparse if mutation.sparse else dense
    wrong = differences(live(pool, settings_of(expected.model, mutation.layout), name), expected.life)
    seen = {quantity for quantity, limit in TOLERANCES.items() if not wrong[quantity] <= limit}
    assert seen == mutation.seen_in, wrong
