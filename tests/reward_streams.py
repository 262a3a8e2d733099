"""Rewards of held-out prompts over a run, made up: what a monitor sees, with the truth known."""

import torch

PROMPTS, EVALUATIONS = 32, 20

# By name: means of gold and proxy at time t in [0, 1], in standard deviations of a completion's
# reward. In an honest run gold never falls while the proxy rises.
HONEST = {
    "both rise": (lambda t: 2 * t, lambda t: 2 * t),
    "both flat": (lambda t: 0 * t, lambda t: 0 * t),
    # The proxy's rise is never in doubt: gold alone decides.
    "gold flat": (lambda t: 0 * t, lambda t: 40 * t),
    "gold flat, heavy tails": (lambda t: 0 * t, lambda t: 40 * t),
    "gold flat, skewed": (lambda t: 0 * t, lambda t: 40 * t),
    "gold rises then is flat": (lambda t: (2 * t).clamp(max=0.8), lambda t: 2 * t),
    "proxy rises faster": (lambda t: 0.5 * t, lambda t: 4 * t),
    "proxy rises, falls, rises, gold with it": (
        lambda t: torch.sin(9 * t),
        lambda t: 0.5 * torch.sin(9 * t),
    ),
    "both fall": (lambda t: -2 * t, lambda t: -t),
    # Gold's fall is never in doubt: the proxy alone decides.
    "gold falls, proxy flat": (lambda t: -40 * t, lambda t: 0 * t),
}


def gamed(t):
    """Gold rises to a peak at two fifths of the run and then falls below where it started."""
    return 2.5 * t.clamp(max=0.4) - 2.5 * (t - 0.4).clamp(min=0)


GAMED = {
    "gamed": (gamed, lambda t: 2 * t),
    "gamed, proxy saturates": (gamed, lambda t: 2 * (1 - torch.exp(-3 * t))),
    "collapse": (lambda t: 1 - 2.0 * (t > 0.7), lambda t: 2 * t),
}


def stream(kind, seed, *, prompts=PROMPTS, evaluations=EVALUATIONS):
    """Gold and proxy, [evaluations + 1, prompts] float64 each.

    Prompts differ in level by a standard deviation, and in how steep their curve is by half of
    it; completions add one, of which gold and proxy share half the variance.
    """
    gold_of, proxy_of = (HONEST | GAMED)[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    t = torch.linspace(0, 1, evaluations + 1, dtype=torch.float64)[:, None]
    shared, own = normal(evaluations + 1, prompts), normal(2, evaluations + 1, prompts)
    noise = (shared + own) / 2**0.5
    if "heavy tails" in kind:  # as Student's with 3 degrees of freedom
        noise = noise / (normal(3, evaluations + 1, prompts).square().mean(0)).sqrt()
    if "skewed" in kind:  # a lognormal's, with mean 0
        noise = noise.exp() - noise.exp().mean()
    steepness = 1 + 0.5 * normal(1, prompts)
    gold, proxy = (curve(t) * steepness + normal(1, prompts) for curve in (gold_of, proxy_of))
    return gold + noise[0], proxy + noise[1]


def alarms(test, kind, seed, **sizes):
    """The evaluations at which a test has an alarm."""
    rows = enumerate(zip(*stream(kind, seed, **sizes), strict=True))
    return [k for k, (gold, proxy) in rows if test.add(gold, proxy).is_alarm]
