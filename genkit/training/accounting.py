"""The privacy that a run spends: ε of Gaussian noise on rows that are drawn by Poisson sampling.

Two data sets are neighbours if one has one row more (add or remove one). Two accountants:

    prv   opacus's, of privacy loss random variables (Gopi et al. 2021,
          https://arxiv.org/abs/2106.02848): the upper end of a numerical interval
    rdp   Rényi divergences (Mironov et al. 2019, https://arxiv.org/abs/1908.10530): looser, in
          NumPy alone
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from importlib.metadata import version

import numpy as np

from genkit import __version__

ACCOUNTANTS = ("prv", "rdp")
ORDERS = np.concatenate([1 + np.geomspace(0.02, 10, 120), np.arange(12, 256), [512.0, 1024.0]])
ERROR = 0.01  # of ε, by prv
MOST_NOISE = 1e4  # that is tried
CLOSE = 1e-3  # relative precision of the noise that is found
MOST_STEPS = 1 << 24


def default_accountant() -> str:
    """Return the tightest accountant that is installed."""
    return "prv" if importlib.util.find_spec("opacus") else "rdp"


def describe_accountant(name: str) -> str:
    """Return an accountant's name and version, for a card."""
    if name == "prv":
        return f"PRV of opacus {version('opacus')}"
    return f"RDP of genkit {__version__}"


def epsilon(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the ε that steps have spent: they are (ε, δ)-differentially private.

    Args:
        accountant: one of ACCOUNTANTS.
        noise: standard deviation of the noise, in units of the largest norm of a row's gradient.
        rate: probability with which a row is drawn.
        steps: number of steps.
        delta: δ.
    """
    if steps == 0:
        return 0.0
    if accountant == "rdp":
        return epsilon_by_rdp(noise, rate, steps, delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        prv = PRVAccountant()
        prv.history = [(noise, rate, steps)]
        return float(prv.get_epsilon(delta, eps_error=ERROR))


def epsilon_by_rdp(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the ε of steps by the Rényi divergence of the best of ORDERS; see `epsilon`.

    Source: Canonne et al. 2020, https://arxiv.org/abs/2004.00010, proposition 12
    """
    spent = steps * renyi_divergences(noise, rate)
    found = spent + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    return max(0.0, float(np.nanmin(found)))


def renyi_divergences(noise: float, rate: float) -> np.ndarray:
    """Return the divergences of one step of the sampled Gaussian mechanism for each of ORDERS.

    The moment of order α is the integral of N(z; 0, σ²) (1 - q + q exp((2 z - 1) / 2 σ²))^α over z,
    by the trapezoidal rule, which converges fast for so smooth a function.

    Source: Mironov et al. 2019, https://arxiv.org/abs/1908.10530, section 3.3
    """
    moments = []
    for order in ORDERS:
        z = np.arange(-14 * noise, order + 14 * noise, noise / 32)
        density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
        shift = (2 * z - 1) / (2 * noise**2)
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + shift) if rate < 1 else shift
        logs = density + order * ratio + math.log(noise / 32)
        highest = logs.max()
        moments.append(highest + math.log(np.exp(logs - highest).sum()))
    return np.maximum(0.0, np.array(moments)) / (ORDERS - 1)


def find_noise(accountant: str, budget: float, rate: float, steps: int, delta: float) -> float:
    """Return the least noise, to a thousandth, whose steps spend at most ε = `budget`.

    Raises:
        ValueError: no noise is enough.
    """
    low, high = 0.0, 0.5
    while epsilon(accountant, high, rate, steps, delta) > budget:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ValueError(f"--epsilon {budget:g} is out of reach: no noise is enough; give more")
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        if middle >= 0.2 and epsilon(accountant, middle, rate, steps, delta) <= budget:
            high = middle
        else:
            low = middle
    return high


def find_steps(
    accountant: str, budget: float, noise: float, rate: float, delta: float, most: int | None
) -> int:
    """Return the largest number of steps, at most `most`, that spend at most ε = `budget`.

    Raises:
        ValueError: not even one step does.
    """

    def fits(steps: int) -> bool:
        return epsilon(accountant, noise, rate, steps, delta) <= budget

    if not fits(1):
        raise ValueError(
            f"--noise {noise:g} spends more than --epsilon {budget:g} in one step; give more noise"
        )
    most = most or MOST_STEPS
    if fits(most):
        return most
    low, high = 1, 2
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
