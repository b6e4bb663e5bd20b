"""The picture of Eq. 8: sampled groups lie on the closed form, and turn where it says."""

import xml.etree.ElementTree as ET

import pytest

from megatron_fapo.algorithm import theory
from tools.draw_shift import CLASSES, OUT, PENALTIES, composition, picture, sampled


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_sampled_groups_follow_the_closed_form(penalty):
    """Groups of 16 vary in γ and have an unbiased std, so they are near the infinite group, not on it."""
    means = sampled(penalty, groups=4000)
    for number, name in enumerate(CLASSES):
        assert len(means[name]) > 6
        for rho, value in means[name]:
            _, gamma, beta = composition(rho)
            assert value == pytest.approx(theory.advantages(beta, gamma, penalty)[number], abs=0.3)
            if name == "flawed" and abs(rho / theory.shift(penalty) - 1) > 0.3:
                assert (value < 0) == (rho > theory.shift(penalty))


def test_the_picture_in_the_docs_is_whole():
    for text in (picture(), OUT.read_text()):
        root = ET.fromstring(text)
        assert len([part for part in root.iter() if part.tag.endswith("polyline")]) == 9
        assert len([part for part in root.iter() if part.tag.endswith("circle")]) > 60
