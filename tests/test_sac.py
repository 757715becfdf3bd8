"""The learner: networks against PyTorch's own, targets against the sum that defines them."""

import functools

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sac_vlmrm import EPISODE_LENGTH, SAC, Actor, Args, ReplayBuffer
from sac_vlmrm import explore, mirror_image, slow_noise

T = EPISODE_LENGTH


def shake(network, by=0.1):
    """Other weights than those of the start, where gains are 1 and shifts 0; and other scales."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += by * torch.randn_like(parameter)
    network.scale_obs.running_mean.normal_()
    network.scale_obs.running_var.uniform_(0.5, 2)


def random_buffer(episodes, size, seed=0):
    """A buffer of random numbers, of which each ring row is another episode."""
    rng, rb = np.random.default_rng(seed), ReplayBuffer(size, "cpu")
    for _ in range(episodes):
        data = {"obs": (1, T + 1, 255), "actions": (1, T, 17), "rewards": (1, T)}
        rb.add(**{key: rng.normal(3, 2, shape) for key, shape in data.items()})
    return rb


# networks
@pytest.mark.parametrize("normalize", [True, False])
def test_two_critics_in_one_equal_two_of_pytorchs_layers(normalize):
    torch.manual_seed(0)
    critics = SAC(Args(normalize=normalize), "cpu").critics
    shake(critics)
    obs, actions = torch.randn(32, 255), torch.randn(32, 17)
    together = critics(obs, actions)
    assert together.shape == (2, 32, 1)
    scale = critics.scale_obs
    obs = (obs - scale.running_mean) / (scale.running_var + scale.eps).sqrt()
    x = torch.cat([obs, actions], -1)
    for member in range(2):
        layers = []
        for i, (weight, bias, *norm) in enumerate(critics.layers()):
            layers.append(nn.Linear(*weight.shape[1:]))
            layers[-1].weight.data = weight[member].T
            layers[-1].bias.data = bias[member, 0]
            if normalize and i < 2:
                layers.append(nn.LayerNorm(128))
                layers[-1].weight.data = norm[0][member, 0]
                layers[-1].bias.data = norm[1][member, 0]
            layers += [nn.ReLU()] * (i < 2)
        expected = nn.Sequential(*layers)(x)
        torch.testing.assert_close(together[member], expected, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().min() > 1e-5


def test_start_is_pytorchs_own():
    """Weights and biases are uniform in +-1/sqrt(fan-in), each critic has its own."""
    torch.manual_seed(0)
    layers = SAC(Args(), "cpu").critics.layers()
    for (weight, bias, *_), fan_in in zip(layers, (272, 128, 128), strict=True):
        reference = nn.Linear(fan_in, 4096)
        std = reference.weight.std().item()
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert weight.abs().max() <= fan_in**-0.5 and bias.abs().max() <= fan_in**-0.5
        assert (weight[0] != weight[1]).all()


def test_log_probability_is_that_of_a_squashed_gaussian():
    torch.manual_seed(0)
    actor = Actor(128, True).double()
    shake(actor, 0.03)
    obs = torch.randn(500, 255, dtype=torch.float64)
    action, log_prob, mean_action = actor.get_action(obs)
    mean, log_std = actor(obs)[0].chunk(2, -1)
    std = (3.5 * torch.tanh(log_std) - 1.5).exp()
    assert std.min() < 0.1 and std.max() > 0.5 and action.abs().max() > 0.99
    torch.testing.assert_close(mean_action, mean.tanh())
    policy = TransformedDistribution(Normal(mean, std), TanhTransform())
    inside = (action.abs() < 1 - 1e-9).all(-1)  # beyond, atanh of the action has lost its digits
    assert inside.float().mean() > 0.5
    expected = policy.log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob[inside], expected[inside], rtol=0, atol=1e-4)


def test_sampled_actions_are_distributed_as_their_log_probability_says():
    torch.manual_seed(0)
    actor = Actor(128, True)
    shake(actor)
    obs = torch.randn(1, 255)
    mean, log_std = actor(obs)[0].chunk(2, -1)
    x = torch.atanh(torch.as_tensor(actor.act(obs.expand(20000, -1))).double().clamp(-1, 1))
    std = (3.5 * torch.tanh(log_std) - 1.5).exp()
    small = (mean.abs() + 3 * std < 4)[0]  # where atanh has its digits
    assert small.sum() > 5
    deviation = (x.mean(0) - mean[0])[small] / std[0, small]
    assert deviation.abs().max() < 5 / 20000**0.5
    torch.testing.assert_close(x.std(0)[small].float(), std[0, small], rtol=0.05, atol=0)
    assert (actor.act(obs, sample=False) == mean.tanh().detach().numpy()).all()


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_slow_noise_stays_normal_and_remembers_its_share(correlation):
    torch.manual_seed(0)
    noise = torch.randn(200, 1000)
    for _ in range(20):
        before = noise.clone()
        slow_noise(noise, correlation)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((before * noise).mean() - correlation) < 0.01


def test_exploration_is_the_mean_plus_noise_in_units_of_the_actors_deviation():
    torch.manual_seed(0)
    actor, noise, obs = Actor(128, True), torch.randn(4, 17), torch.randn(4, 255)
    action = torch.as_tensor(explore(actor, noise, 0.8, obs))
    mean, log_std = actor(obs)[0].chunk(2, -1)
    x = mean + (3.5 * torch.tanh(log_std) - 1.5).exp() * noise  # the noise that explore moved on
    torch.testing.assert_close(action, torch.tanh(x).detach())


def test_target_critics_and_average_actor_are_exponential_averages():
    sac, obs, actions = SAC(Args(tau=0.1), "cpu"), torch.randn(8, 255), torch.rand(8, 17)
    targets = sac.target_critics.weights.clone(), sac.average_actor.weights.clone()
    sac.update_critics(obs, actions, torch.rand(8), obs, torch.full((8,), 0.9))
    sac.update_actor(obs, -17.0)
    for slow, before, fast, share in (
        (sac.target_critics, targets[0], sac.critics, 0.1),
        (sac.average_actor, targets[1], sac.actor, 0.001),
    ):
        assert (fast.weights != before).any()
        torch.testing.assert_close(slow.weights, before.lerp(fast.weights.detach(), share))


# replay buffer
def test_ring_goes_round_and_keeps_whole_episodes():
    rb = ReplayBuffer(3, "cpu")
    for i in range(0, 8, 2):  # two at a time into three rows
        number = np.array([i, i + 1.0])[:, None]
        rb.add(
            obs=np.tile(number[..., None], (1, T + 1, 255)),
            actions=np.tile(number[..., None], (1, T, 17)),
            rewards=np.tile(number, (1, T)),
        )
        assert len(rb) == min(i + 2, 3) and rb.total == i + 2
    for ring in rb.data.values():
        assert sorted(ring.reshape(3, -1)[:, 0].tolist()) == [5, 6, 7]
        assert (ring.reshape(3, -1) == ring.reshape(3, -1)[:, :1]).all()


def test_saved_chunks_give_the_ring_back_and_spent_ones_go(tmp_path):
    """Also to the older of two checkpoints, after the newer one has been saved."""
    rng, rb = np.random.default_rng(0), ReplayBuffer(4, "cpu")
    rings, previous = {}, 0
    for total in range(2, 15, 2):
        data = {"obs": (2, T + 1, 255), "actions": (2, T, 17), "rewards": (2, T)}
        rb.add(**{key: rng.normal(size=shape) for key, shape in data.items()})
        rb.save(tmp_path)
        rings[total] = {key: ring.clone() for key, ring in rb.data.items()}
        newest = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
        for wanted in {total, previous} - {0}:
            other = ReplayBuffer(4, "cpu")
            other.load(tmp_path, wanted)
            assert other.total == wanted
            assert all(torch.equal(other.data[key], ring) for key, ring in rings[wanted].items())
            for path, content in newest.items():
                path.write_bytes(content)
        previous = total
    assert len(list(tmp_path.glob("replay_*.pt"))) <= 4


def test_chunks_that_stay_for_others_do_not_change_the_ring(tmp_path):
    """Of 14 episodes ten stay on disk, the ring holds the last four."""
    rb = ReplayBuffer(4, "cpu", on_disk=10)
    for total in range(2, 15, 2):
        data = {"obs": (2, T + 1, 255), "actions": (2, T, 17), "rewards": (2, T)}
        rb.add(**{key: np.full(shape, total) for key, shape in data.items()})
        rb.save(tmp_path)
    ends = sorted(int(path.stem.split("_")[-1]) for path in tmp_path.glob("replay_*.pt"))
    assert ends == [4, 6, 8, 10, 12, 14]  # ten before the checkpoint before, and the newest
    other = ReplayBuffer(4, "cpu", on_disk=10)
    other.load(tmp_path, 14)
    assert all(torch.equal(other.data[key], ring) for key, ring in rb.data.items())


# targets
@pytest.mark.parametrize("n_step", [1, 5, T])
def test_rewards_of_several_steps_stay_in_their_episode(n_step):
    """Targets of a batch against the sum that defines them; the ring has gone round."""
    gamma, numbers = 0.9, np.random.default_rng(0)
    rewards, values = numbers.normal(size=(7, T)), numbers.normal(size=(7, T + 1))
    rb = ReplayBuffer(4, "cpu")
    for episode in range(7):
        obs = np.zeros((1, T + 1, 255))
        obs[..., 0], obs[..., 1], obs[..., 2] = episode, np.arange(T + 1), values[episode]
        actions = np.tile(np.arange(T)[None, :, None], (1, 1, 17))
        rb.add(obs=obs, actions=actions, rewards=rewards[episode][None])
    args = Args(
        gradient_steps=3, batch_size=400, n_step=n_step, gamma=gamma, normalize=False, mirror=False
    )
    torch.manual_seed(0)
    batches = list(SAC(args, "cpu").batches(rb))
    assert len(batches) == 3
    obs, actions, n_step_rewards, next_obs, discount = (torch.cat(x) for x in zip(*batches))
    assert torch.equal(actions, obs[:, 1:2].expand(-1, 17))
    targets = n_step_rewards + discount * next_obs[:, 2]
    for (episode, t), target in zip(obs[:, :2].int().tolist(), targets.tolist()):
        steps = min(n_step, T - t)
        expected = sum(gamma**k * rewards[episode, t + k] for k in range(steps))
        expected += gamma**steps * values[episode, t + steps]
        assert target == pytest.approx(expected, abs=1e-4)
    assert torch.equal(next_obs[:, 0], obs[:, 0])
    assert set(obs[:, 0].int().tolist()) == {3, 4, 5, 6}
    assert {0, T - 1} <= set(obs[:, 1].int().tolist()) and T not in obs[:, 1]


def test_mirrored_half_is_the_mirror_image_of_real_transitions():
    rb = random_buffer(3, 4)
    before = {key: ring.clone() for key, ring in rb.data.items()}
    batches = {}
    for mirror in (False, True):
        sac = SAC(Args(gradient_steps=2, batch_size=60, mirror=mirror), "cpu")
        torch.manual_seed(0)
        batches[mirror] = list(sac.batches(rb))
    mirror_obs, mirror_action = mirror_image("cpu")
    images = mirror_obs, mirror_action, lambda x: x, mirror_obs, lambda x: x
    for plain, mirrored in zip(batches[False], batches[True]):
        assert plain[0].shape == (60, 255)
        for x, y, image in zip(plain, mirrored, images):
            assert torch.equal(y[30:], x[30:]) and torch.equal(y[:30], image(x[:30]))
    assert (batches[True][0][0][:30] != batches[False][0][0][:30]).any()
    assert all(torch.equal(rb.data[key], ring) for key, ring in before.items())


def test_the_scale_of_observations_follows_the_rounds_and_that_of_rewards_stays():
    rb, sac = random_buffer(3, 4), SAC(Args(gradient_steps=1, batch_size=16), "cpu")
    scales = sac.actor.scale_obs, sac.scale_reward

    def statistics(rows):
        obs, _, rewards = (ring[rows].double().flatten(0, 1) for ring in rb.data.values())
        return [
            f(x) for x in (obs, rewards[:, None]) for f in (lambda y: y.mean(0), lambda y: y.var(0))
        ]

    def scaled_by():
        return [x.double() for s in scales for x in (s.running_mean, s.running_var)]

    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    sac.learn(rb, 0.1)
    first = statistics(slice(0, 3))
    close(scaled_by(), first)
    for other in (sac.critics, sac.target_critics, sac.average_actor):
        assert other.scale_obs is sac.actor.scale_obs
    rb.add(**{key: 9 * torch.randn(1, *ring.shape[1:]) for key, ring in rb.data.items()})
    sac.learn(rb, 0.2)
    new = statistics([3])
    close(scaled_by(), [(first[0] + new[0]) / 2, (first[1] + new[1]) / 2, *first[2:]])


def test_targets_are_of_the_lesser_critic_and_pay_for_entropy():
    """The critics' losses of one update against the equations of soft actor-critic."""
    torch.manual_seed(0)
    sac = SAC(Args(alpha=0.3), "cpu")
    for network in (sac.actor, sac.critics, sac.target_critics):
        shake(network)
    obs, next_obs, actions = torch.randn(2, 64, 255).unbind() + (torch.rand(64, 17),)
    rewards, discount = torch.randn(64), torch.rand(64)
    before = [p.clone() for p in sac.actor.parameters()]
    with torch.no_grad():
        torch.manual_seed(1)
        next_actions, log_prob, _ = sac.actor.get_action(next_obs)
        q1, q2 = sac.target_critics(next_obs, next_actions)[..., 0]
        target = rewards + discount * (torch.minimum(q1, q2) - 0.3 * log_prob)
        expected = [((q - target) ** 2).mean() for q in sac.critics(obs, actions)[..., 0]]
    torch.manual_seed(1)
    losses = sac.update_critics(obs, actions, rewards, next_obs, discount)
    torch.testing.assert_close([losses["qf1_loss"], losses["qf2_loss"]], expected)
    assert all(torch.equal(p, q) for p, q in zip(sac.actor.parameters(), before))


def test_update_of_the_actor_leaves_the_critics_alone_and_tunes_the_entropy():
    """The coefficient falls where the policy has more entropy than asked for, else it rises."""
    for target_entropy, rises in ((-1000.0, False), (1000.0, True)):
        torch.manual_seed(0)
        sac = SAC(Args(), "cpu")
        critics = [p.clone() for p in sac.critics.parameters()]
        actor, alpha = [p.clone() for p in sac.actor.parameters()], sac.log_alpha.item()
        losses = sac.update_actor(torch.randn(64, 255), target_entropy)
        assert (sac.log_alpha.item() > alpha) == rises
        assert all(torch.equal(p, q) for p, q in zip(sac.critics.parameters(), critics))
        assert sac.critics.weights.grad is None
        assert any((p != q).any() for p, q in zip(sac.actor.parameters(), actor))
        assert losses["alpha"].item() == pytest.approx(0.1)


def test_annealing_starts_at_half_time():
    """The networks' learning rates fall to a tenth, the target entropy to -51; without it, and of
    the entropy coefficient, they stay."""

    class Recorder(SAC):
        def update_actor(self, obs, target_entropy):
            targets.append(target_entropy)
            return super().update_actor(obs, target_entropy)

    rb = random_buffer(2, 2)
    annealed = [1, 1, 0.55, 0.1], [-4, -4, -27.5, -51]
    for anneal, expected in ((True, annealed), (False, ([1] * 4, [-4] * 4))):
        sac = Recorder(Args(gradient_steps=1, batch_size=8, anneal=anneal), "cpu")
        rates, targets = [], []
        for progress in (0.1, 0.5, 0.75, 1.0):
            sac.learn(rb, progress)
            (critics,), (actor, alpha) = (
                [group["lr"] for group in optimizer.param_groups]
                for optimizer in (sac.q_optimizer, sac.actor_optimizer)
            )
            assert critics == actor and alpha == sac.args.learning_rate
            rates.append(actor / sac.args.learning_rate)
        assert rates == pytest.approx(expected[0]) and targets == pytest.approx(expected[1])
