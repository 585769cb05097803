"""Colours of the attentions: every eye can tell those apart that the figures highlight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scatterbrain import ATTENTIONS
from src.evaluation.colours import ATTENTION_COLOURS, ATTENTION_MARKERS, OTHER_COLOUR

# What the eye types see, in linear RGB: Machado, Oliveira, Fernandes, IEEE Transactions on Visualization and Computer
# Graphics 15(6), 2009, severity 1.
EYES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])
LEAST_DISTANCE = 10  # of CIELAB; 2.3 is just noticeable between large patches


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as an eye sees it."""
    rgb = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ (EYES[eye] @ linear).clip(0, 1) / (TO_XYZ @ np.ones(3))
    roots = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])])


def nearest(colours: list[str], eye: str) -> tuple[float, tuple[str, str]]:
    """The smallest distance between two colours, and which two."""
    return min(
        (float(np.linalg.norm(lab(one, eye) - lab(other, eye))), (one, other))
        for one, other in itertools.combinations(colours, 2)
    )


@pytest.mark.parametrize("eye", EYES)
def test_highlighted_attentions_and_grey_are_different_to_every_eye(eye):
    distance, pair = nearest(sorted(set(ATTENTION_COLOURS.values())), eye)
    assert distance > LEAST_DISTANCE, f"{pair} are too alike under {eye}"


def test_the_former_colours_of_local_and_smyrf_would_fail():
    assert nearest(["#3b7dc4", "#8e63c7"], "deuteranopia")[0] < LEAST_DISTANCE


def test_every_attention_has_a_colour_and_a_marker_and_grey_ones_share_it():
    assert set(ATTENTION_COLOURS) == set(ATTENTION_MARKERS) == set(ATTENTIONS)
    own = [colour for colour in ATTENTION_COLOURS.values() if colour != OTHER_COLOUR]
    assert len(set(own)) == len(own) == 9
