"""Pictures of CartPole and MountainCar with captions, for the training of the small CLIP.

The captions say what a person would say of the picture, not how good it is. Every caption comes
from a glance of its own, which misjudges angle or position: mostly a little, sometimes a lot, but
the more the rarer. So captions of neighbouring states overlap, and those of far states are not all
equally wrong: near the flag is less wrong of a car half way up than of one in the valley.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ppo_vlmrm_classic import CartPole, MountainCar


def glance(rng, value, little, a_lot):
    """`value` as seen by one person: three in four misjudge it by `little`, the others by up to
    `a_lot` and more."""
    return value + (rng.normal(0, little) if rng.random() < 0.75 else rng.laplace(0, a_lot))


def cartpole_caption(rng, x, theta):
    """One person's words for a pole at `theta` (0: up, positive: to the right) on a cart at x."""
    degrees = np.degrees(theta)
    degrees = glance(rng, degrees, 2 + 0.08 * abs(degrees), 30)
    degrees = (degrees + 180) % 360 - 180
    side, tilt = "right" if degrees > 0 else "left", abs(degrees)
    if tilt < 5:
        words = [
            "pole vertically upright on top of the cart",
            "pole vertically upright on top of the cart",
            "a pole standing straight up on top of the cart",
            "a vertical pole balanced on a cart",
            "the pole is perfectly upright on the cart",
            "a cart with an upright pole",
        ]
    elif tilt < 12:
        words = [
            f"a pole almost upright on top of the cart, leaning very slightly to the {side}",
            f"a nearly vertical pole on a cart, tilted a little to the {side}",
            f"a pole leaning slightly to the {side} on top of the cart",
            "a nearly upright pole on top of the cart",
        ]
    elif tilt < 25:
        words = [
            f"a pole leaning to the {side} on top of the cart",
            f"a pole tilted to the {side} on a cart",
            f"the pole on top of the cart leans to the {side}",
        ]
    elif tilt < 50:
        words = [
            f"a pole leaning far to the {side} on a cart",
            f"a pole falling to the {side}",
            f"a cart with a strongly tilted pole, falling to the {side}",
        ]
    elif tilt < 75:
        words = [
            f"a pole falling over to the {side} of the cart",
            f"a pole that has almost fallen over to the {side}",
            f"a nearly horizontal pole, falling to the {side} of the cart",
        ]
    elif tilt < 105:
        words = [
            f"a horizontal pole sticking out to the {side} of the cart",
            f"a pole lying horizontally, pointing to the {side}",
            f"the pole has fallen over to the {side}",
        ]
    elif tilt < 140:
        words = [
            f"a fallen pole pointing down to the {side} of the cart",
            f"a pole hanging down to the lower {side} of the cart",
            f"the pole has fallen below the cart, to the {side}",
        ]
    elif tilt < 168:
        words = [
            f"a pole hanging down below the cart, a little to the {side}",
            "a pole hanging down below the cart",
            f"a fallen pole hanging to the lower {side}",
        ]
    else:
        words = [
            "a pole hanging straight down below the cart",
            "a pole hanging down below the cart",
            "the pole points down, below the cart",
        ]
    caption = str(rng.choice(words))
    where = x + rng.normal(0, 0.15)
    if rng.random() < 0.2:
        side = "left" if where < 0 else "right"
        place = "in the middle of the track"
        if abs(where) > 2.4:
            place = f"at the far {side} end of the track"
        elif abs(where) > 0.8:
            place = f"on the {side} side of the track"
        caption = f"{caption}, {place}" if rng.random() < 0.6 else f"a pole and a cart {place}"
    return caption


def mountain_car_caption(rng, x):
    """One person's words for a car at x: the valley is at -0.52, the peak at 0.52, the flag at
    0.45."""
    x = glance(rng, x, 0.035, 0.3)
    if x < -1.0:
        words = [
            "a car high up on the left slope",
            "a car near the top of the left slope, far away from the flag",
            "a car at the left edge of the picture, high on the mountain",
        ]
    elif x < -0.8:
        words = [
            "a car on the left slope",
            "a car half way up the left slope",
            "a car on the slope to the left of the valley",
        ]
    elif x < -0.62:
        words = [
            "a car low on the left slope",
            "a car in the valley, a little to the left",
            "a car at the foot of the left slope",
        ]
    elif x < -0.42:
        words = [
            "a car in the valley",
            "a car at the bottom of the valley",
            "a car at the lowest point, between the mountains",
        ]
    elif x < -0.25:
        words = [
            "a car in the valley, a little to the right",
            "a car at the foot of the right slope",
            "a car at the bottom of the mountain, below the flag",
        ]
    elif x < -0.08:
        words = [
            "a car low on the right slope",
            "a car beginning to climb the mountain",
            "a car low on the slope of the mountain, below the flag",
        ]
    elif x < 0.1:
        words = [
            "a car half way up the right slope",
            "a car in the middle of the slope of the mountain",
            "a car climbing the mountain with the flag",
        ]
    elif x < 0.25:
        words = [
            "a car high up on the right slope",
            "a car high on the slope of the mountain, below the flag",
            "a car more than half way up the mountain, near the flag",
        ]
    elif x < 0.38:
        words = [
            "a car near the top of the mountain, close to the yellow flag",
            "a car just below the peak of the mountain, close to the yellow flag",
            "a car almost at the peak of the mountain",
        ]
    else:
        words = [
            "a car at the peak of the mountain, next to the yellow flag",
            "a car at the peak of the mountain, next to the yellow flag",
            "a car at the top of the mountain, at the yellow flag",
            "a car on the summit, beside the flag",
            "a car at the peak of the mountain",
        ]
    return str(rng.choice(words))


def classic_examples(rng, n, size):
    """n pictures (n, size, size, 3) uint8 and for each a list of captions, one of eight glances
    each and a general one."""
    frames, captions = np.empty((n, size, size, 3), dtype=np.uint8), []
    for i in range(n):
        if rng.random() < 0.5:
            x = rng.uniform(-CartPole.TRACK_END, CartPole.TRACK_END)
            near = rng.random() < 0.5
            theta = rng.normal(0, np.radians(20)) if near else rng.uniform(-np.pi, np.pi)
            frames[i] = CartPole().draw((x, 0, theta, 0), size)
            said = [cartpole_caption(rng, x, theta) for _ in range(8)]
            plain = ["pole and cart", "pole and cart", "a cart with a pole on a track"]
        else:
            x = rng.uniform(MountainCar.LEFT_WALL, MountainCar.RIGHT_WALL)
            textured = rng.random() < 0.7
            frames[i] = MountainCar().draw((x, 0), size, textured)
            said = [mountain_car_caption(rng, x) for _ in range(8)]
            look = (
                "a red car on a rocky mountain" if textured else "a line drawing of a car on a hill"
            )
            plain = ["a car in the mountain", "a car in the mountain", look]
        captions.append([*said, str(rng.choice(plain))])
    return frames, captions
