"""CartPole and MountainCar from a sentence: a vision-language model is the reward, PPO the learner."""

import functools

import numpy as np

EPISODE_LENGTH = 200  # steps; every episode runs to its end (paper, section 4.2)


# ENVIRONMENT: what the camera sees. Both scenes are drawn in numpy, pixel for pixel a function of the state.
def fill(picture, points, color, radius=0.0):
    """Fill a convex polygon, points (K, 2) in pixels in either direction, grown by `radius`; one point makes a disc.

    `picture` (H, W, 3) uint8 is changed in place. Edges are anti-aliased by their distance from the pixel's centre.
    """
    points = np.asarray(points, dtype=np.float64)
    margin = radius + 1
    x0, y0 = np.maximum(np.floor(points.min(0) - margin).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(points.max(0) + margin).astype(int), [picture.shape[1], picture.shape[0]])
    if x0 >= x1 or y0 >= y1:
        return
    x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1)[:, None] + 0.5
    if len(points) == 1:
        distance = np.sqrt((x - points[0, 0]) ** 2 + (y - points[0, 1]) ** 2)  # (h, w)
    else:
        edges = np.roll(points, -1, 0) - points
        turn = edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0]
        normals = edges[:, ::-1] * [1, -1] * np.sign(turn) / np.linalg.norm(edges, axis=1, keepdims=True)
        offsets = (normals * points).sum(1)
        distance = functools.reduce(np.maximum, [nx * x + ny * y - c for (nx, ny), c in zip(normals, offsets)])
    coverage = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    window = picture[y0:y1, x0:x1]
    window[:] = window + coverage * (np.asarray(color) - window) + 0.5


def noise_texture(rng, size, octaves, falloff=1.0):
    """Smooth, tileable value noise in [0, 1], (size, size): random grids of growing resolution, added up."""
    total = np.zeros((size, size))
    for cells in octaves:
        grid = np.pad(rng.random((cells, cells)), ((0, 1), (0, 1)), mode="wrap")
        x = np.linspace(0, cells, size, endpoint=False)
        i, f = x.astype(int), x % 1
        f = f * f * (3 - 2 * f)
        rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
        total += (rows[:, i] * (1 - f) + rows[:, i + 1] * f) / cells**falloff
    return total / sum(1 / cells**falloff for cells in octaves)


def rectangle(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


@functools.lru_cache
def cartpole_backdrop(size, textured):
    """Everything that does not move, (size, size, 3) uint8."""
    if not textured:  # as Gymnasium: a black line on white
        picture = np.full((size, size, 3), 255, dtype=np.uint8)
        fill(picture, rectangle(0, 0.523 * size, size, 0.527 * size), (0, 0, 0))
        return picture
    y = (np.arange(size) + 0.5)[:, None] / size
    grain = noise_texture(np.random.default_rng(1), size, (4, 16, 64), 0.5)[..., None] - 0.5
    wall = np.array([222, 232, 240]) - [26, 20, 12] * y[..., None] + 6 * grain
    floor = np.array([188, 150, 108]) - [40, 40, 40] * (y[..., None] - 0.86) / 0.14 + 40 * grain
    picture = np.where(y[..., None] < 0.86, wall, floor).clip(0, 255).astype(np.uint8)
    fill(picture, rectangle(0, 0.86 * size, size, 0.875 * size), (140, 110, 80))
    for x in (0.05, 0.95):  # the track on two stands
        fill(picture, rectangle((x - 0.012) * size, 0.54 * size, (x + 0.012) * size, 0.92 * size), (120, 128, 138))
        fill(picture, rectangle((x - 0.04) * size, 0.915 * size, (x + 0.04) * size, 0.94 * size), (96, 104, 114))
    fill(picture, rectangle(0.02 * size, 0.535 * size, 0.98 * size, 0.56 * size), (150, 158, 168), radius=size / 200)
    fill(picture, rectangle(0.02 * size, 0.535 * size, 0.98 * size, 0.54 * size), (96, 104, 114), radius=size / 400)
    return picture


def draw_cartpole(x, theta, size, textured=True):
    """Frame (size, size, 3) uint8. Cart and pole are drawn at 2.2 times the scale of the track, or both would be tiny."""
    picture = cartpole_backdrop(size, textured).copy()
    center = (0.5 + x * 0.88 / (2 * CartPole.X_CLAMP) * 0.92) * size
    top, length = 0.44 * size, 0.33 * size
    tip = np.array([center + length * np.sin(theta), top - length * np.cos(theta)])
    across = np.array([np.cos(theta), np.sin(theta)]) * 0.014 * size
    foot = np.array([center, top])
    body, pole, wheel = ((52, 92, 158), (196, 102, 40), (44, 48, 56)) if textured else ((0, 0, 0), (202, 152, 101), (0, 0, 0))
    if textured:
        for dx in (-0.05, 0.05):
            fill(picture, [(center + dx * size, 0.52 * size)], wheel, radius=0.021 * size)
            fill(picture, [(center + dx * size, 0.52 * size)], (170, 176, 184), radius=0.008 * size)
        fill(picture, rectangle(center - 0.072 * size, 0.435 * size, center + 0.072 * size, 0.5 * size), body, radius=0.012 * size)
        fill(picture, rectangle(center - 0.072 * size, 0.435 * size, center + 0.072 * size, 0.445 * size), (104, 146, 206), radius=0.006 * size)
    else:
        fill(picture, rectangle(center - 0.075 * size, 0.44 * size, center + 0.075 * size, 0.52 * size), body)
    fill(picture, [foot - across, tip - across, tip + across, foot + across], pole, radius=0.006 * size)
    fill(picture, [foot], (236, 196, 88) if textured else (129, 132, 203), radius=0.017 * size)
    return picture


# MountainCar: 2.3 metres wide, so that the goal is a peak with a far side and not the edge of the picture
LEFT, BOTTOM, METRES, STEEPEN = -1.4, -0.3, 2.3, 1.15


def hill(x):
    """Height of the track in metres."""
    return 0.45 * np.sin(3 * x) + 0.55


def to_pixels(x, height, size):
    return np.stack([(np.asarray(x) - LEFT) / METRES * size, size - (np.asarray(height) - BOTTOM) * STEEPEN / METRES * size], -1)


@functools.lru_cache
def mountain_backdrop(size, textured):
    """Everything that does not move, (size, size, 3) uint8."""
    fine = 4 * size  # drawn at four times the size and averaged
    column = np.arange(fine) + 0.5
    x = LEFT + column / fine * METRES
    track = to_pixels(x, hill(x), fine)[:, 1]  # the row of the ground in every column
    row = np.arange(fine)[:, None] + 0.5
    depth = (row - track) / fine  # below the ground, in pictures; distance along the vertical
    depth = depth / np.sqrt(1 + (STEEPEN * 1.35 * np.cos(3 * x)) ** 2)  # about the distance from the ground itself
    if not textured:  # as Gymnasium: a black line on white
        picture = np.where(abs(depth)[..., None] < 0.004, 0, 255) * np.ones(3)
    else:
        rng = np.random.default_rng(4)
        height = 1 - row / fine
        picture = np.array([96, 158, 222]) + (np.array([214, 232, 244]) - [96, 158, 222]) * (1 - height[..., None]) ** 0.8 * np.ones((fine, fine, 1))
        clouds = noise_texture(rng, fine, (3, 6, 12, 24), 0.8)
        picture += np.clip((clouds - 0.5) / 0.2, 0, 0.85)[..., None] * (255 - picture)
        ridge = noise_texture(rng, fine, (2, 4, 8, 16, 32), 1.0)[0]  # far mountains in the haze
        for base, color in ((0.50, (168, 188, 212)), (0.40, (140, 164, 190))):
            ridge = np.roll(ridge, fine // 3)
            picture = np.where((height < base + 0.35 * (ridge - 0.5))[..., None], np.array(color) + 20 * (0.5 - height[..., None]), picture)
        rock = noise_texture(rng, fine, (6, 12, 24, 48, 96, 192), 0.55)
        light = np.gradient(rock, axis=1) - 0.6 * np.gradient(rock, axis=0)  # the sun stands upper left
        strata = 0.5 + 0.5 * np.sin(60 * (depth + 0.25 * rock))
        stone = np.array([128, 112, 98]) * (0.6 + 0.55 * rock + 0.12 * strata + light * fine / 24)[..., None] - 40 * np.clip(depth, 0, 0.5)[..., None]
        ground = BOTTOM + (1 - row / fine) * METRES / STEEPEN  # height above sea level, metres
        grass = np.clip((0.55 - ground + 0.5 * (rock - 0.5)) / 0.1, 0, 1) * np.clip(0.045 + 0.06 * (rock - 0.5) - depth, 0, 0.01) / 0.01
        snow = np.clip((ground - 0.80 + 0.5 * (rock - 0.5)) / 0.05, 0, 1)
        stone += grass[..., None] * (np.array([96, 140, 66]) * (0.7 + 0.6 * rock)[..., None] - stone)
        stone += snow[..., None] * (np.array([240, 245, 252]) * (0.82 + 0.22 * rock + light * fine / 40)[..., None] - stone)
        path = np.clip((0.012 - depth) / 0.003, 0, 1)[..., None]
        stone += path * 0.75 * (np.array([104, 88, 72]) * (0.85 + 0.3 * rock)[..., None] - stone)
        picture = np.where(depth[..., None] > 0, stone, picture)
    picture = picture.clip(0, 255).reshape(size, 4, size, 4, 3).mean((1, 3)).astype(np.uint8)
    foot = to_pixels(MountainCar.GOAL, hill(MountainCar.GOAL), size)
    tall, wide = (0.235 if textured else 0.125) * size, (0.12 if textured else 0.05) * size
    top = foot - [0, tall]
    thick = (0.007 if textured else 0.003) * size
    fill(picture, rectangle(foot[0] - thick, top[1], foot[0] + thick, foot[1]), (70, 60, 54) if textured else (0, 0, 0))
    flag = [top, top + [0, 0.48 * wide * 1.6], top + [wide, 0.24 * wide * 1.6]]
    fill(picture, flag, (252, 214, 20) if textured else (204, 204, 0), radius=0.004 * size if textured else 0.0)
    return picture


def draw_mountain_car(x, size, textured=True):
    """Frame (size, size, 3) uint8 of a car at x, tilted with the slope."""
    picture = mountain_backdrop(size, textured).copy()
    slope = np.arctan(STEEPEN * 1.35 * np.cos(3 * x))
    forward, up = np.array([np.cos(slope), -np.sin(slope)]), np.array([-np.sin(slope), -np.cos(slope)])
    ground = to_pixels(x, hill(x), size)
    place = lambda points: ground + size * np.asarray(points) @ np.stack([forward, up])  # noqa: E731
    if not textured:
        fill(picture, place([(-0.033, 0.015), (0.033, 0.015), (0.033, 0.055), (-0.033, 0.055)]), (0, 0, 0))
        for dx in (-0.017, 0.017):
            fill(picture, place([(dx, 0.018)]), (128, 128, 128), radius=0.018 * size)
        return picture
    red = (206, 34, 40)
    fill(picture, place([(-0.052, 0.058), (0.03, 0.058), (0.008, 0.098), (-0.036, 0.098)]), red, radius=0.006 * size)  # cabin
    fill(picture, place([(-0.078, 0.03), (0.082, 0.03), (0.084, 0.05), (0.04, 0.062), (-0.076, 0.062)]), red, radius=0.008 * size)
    for window in ([(-0.042, 0.064), (-0.017, 0.064), (-0.017, 0.092), (-0.031, 0.092)], [(-0.009, 0.064), (0.021, 0.064), (0.005, 0.092), (-0.009, 0.092)]):
        fill(picture, place(window), (196, 226, 246))
    fill(picture, place([(0.086, 0.05)]), (255, 240, 170), radius=0.008 * size)  # headlight
    for dx in (-0.046, 0.05):
        fill(picture, place([(dx, 0.025)]), (28, 28, 32), radius=0.026 * size)
        fill(picture, place([(dx, 0.025)]), (190, 194, 200), radius=0.011 * size)
    return picture


# ENVIRONMENT: the physics of Gymnasium's CartPole-v1 and MountainCarContinuous-v0 for N episodes side by side, without termination
class CartPole:
    """state (N, 4): x, its velocity, angle (0: up, positive: to the right), its velocity. Actions (N,): 0 pushes left, 1 right."""

    X_CLAMP = 3.0  # metres; wider than the goal's 2.4, so that a cart that left the goal is seen to have left
    PROMPT, BASELINE = "pole vertically upright on top of the cart", "pole and cart"
    num_actions = 2  # discrete
    obs_scale = np.array([2.4, 2.0, 1.0, 1.0, 2.5])

    def reset(self, seeds):
        self.state = np.stack([np.random.default_rng(seed).uniform(-0.05, 0.05, 4) for seed in seeds])

    def step(self, actions):
        x, x_dot, theta, theta_dot = self.state.T
        force, cos, sin = np.where(actions == 1, 10.0, -10.0), np.cos(theta), np.sin(theta)
        # cart 1 kg, pole 0.1 kg, half its length 0.5 m, g 9.8, Euler steps of 20 ms
        push = (force + 0.05 * theta_dot**2 * sin) / 1.1
        theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        x_acc = push - 0.05 * theta_acc * cos / 1.1
        x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
        theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
        x_dot = np.where(abs(x) >= self.X_CLAMP, 0.0, x_dot)  # the stop at the end of the track takes all speed
        theta = (theta + np.pi) % (2 * np.pi) - np.pi
        self.state = np.stack([x.clip(-self.X_CLAMP, self.X_CLAMP), x_dot, theta, theta_dot], 1)

    def observe(self):
        x, x_dot, theta, theta_dot = self.state.T  # cosine and sine: the angle jumps at the bottom, the policy's input does not
        return (np.stack([x, x_dot, np.cos(theta), np.sin(theta), theta_dot], 1) / self.obs_scale).astype(np.float32)

    @staticmethod
    def in_goal(state):
        """Ground truth (N,) bool of states (N, 4), for reports and for --reward ground-truth."""
        return (abs(state[:, 2]) <= np.radians(12)) & (abs(state[:, 0]) <= 2.4)

    @staticmethod
    def success(in_goal):
        """Episodes (E,) that succeeded, of in_goal (E, T): upright and on the track at every step."""
        return in_goal.all(1)

    def true_reward(self, actions):
        return np.where(self.in_goal(self.state), 1.0, -1.0)

    @staticmethod
    def draw(state, size, textured):
        return draw_cartpole(state[0], state[2], size, textured)


class MountainCar:
    """state (N, 2): x, velocity. Actions (N,) in [-1, 1]: the force to the right."""

    LEFT_WALL, GOAL, RIGHT_WALL = -1.2, 0.45, 0.6  # metres
    PROMPT, BASELINE = "a car at the peak of the mountain, next to the yellow flag", "a car in the mountain"
    num_actions = 0  # continuous
    obs_scale = np.array([0.6, 0.04])

    def reset(self, seeds):
        self.state = np.stack([[np.random.default_rng(seed).uniform(-0.6, -0.4), 0.0] for seed in seeds])

    def step(self, actions):
        x, v = self.state.T
        arrived = x >= self.GOAL
        v = (v + 0.0015 * actions.clip(-1, 1) - 0.0025 * np.cos(3 * x)).clip(-0.07, 0.07)
        v = np.where(arrived, 0.0, v)  # the goal is absorbing: the car stays where it arrived
        x = (x + v).clip(self.LEFT_WALL, self.RIGHT_WALL)
        v = np.where((x == self.LEFT_WALL) & (v < 0), 0.0, v)
        self.state = np.stack([x, v], 1)

    def observe(self):
        return ((self.state + [0.3, 0.0]) / self.obs_scale).astype(np.float32)

    @staticmethod
    def in_goal(state):
        return state[:, 0] >= MountainCar.GOAL

    @staticmethod
    def success(in_goal):
        return in_goal.any(1)

    def true_reward(self, actions):
        return self.in_goal(self.state) - 0.1 * actions.clip(-1, 1) ** 2

    @staticmethod
    def draw(state, size, textured):
        return draw_mountain_car(state[0], size, textured)
