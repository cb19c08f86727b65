"""Bits per dimension by the variational bound, and progressive rate-distortion (Ho et al. 2020, sections 3 and 4.3).

The bound is that of the chain of the sampler `ddpm` at the same times: noise from the prior, a normal distribution for
each step, and a decoder for the step that ends at t = 0. Fewer steps give a higher bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.samplers.steps import Denoise, Generators, Point, fresh_share, noise_like, step_points
from ldm.schedules.noise_schedule import Schedule

HALF_BIN = 1 / 255  # half the distance of two 8-bit values in [-1, 1]
EIGHT_BIT_UNIT = 127.5  # 8-bit values per 1.0: images are in [-1, 1], their values in 0 .. 255
LOG_2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An upper bound on -log2 p(z_0), term by term, in bits per dimension of each image (Ho et al. 2020, eq. 5)."""

    times: Tensor  # [S] float64, falling: the levels at which z_0 was estimated
    prior: Tensor  # [B], L_T: cost of z_t at the first of the times
    terms: Tensor  # [S - 1, B], L_{t-1}: cost of the step from each time to the next one
    decoder: Tensor  # [B], L_0: cost of z_0 given z_t at the last of the times
    errors: Tensor  # [S, B], mean squared error of the estimate of z_0 at each time

    @property
    def total(self) -> Tensor:
        """The upper bound on -log2 p(z_0) in bits per dimension of each image, [B]: the sum of all terms."""
        return self.prior + self.terms.sum(0) + self.decoder


@dataclass(frozen=True, kw_only=True)
class RateDistortion:
    """Bits and error of the progressive transmission of z_0, coarse to fine (Ho et al. 2020, fig. 5 and table 4)."""

    times: Tensor  # [S] float64, falling
    rate: Tensor  # [S], bits per dimension sent up to z_t
    distortion: Tensor  # [S], root mean squared error of the estimate of z_0 then
    remaining: Tensor  # [S], bits per dimension still to be sent


def _small(t: Point, s: Point) -> float:
    return s.sigma**2 * fresh_share(t, s)


def _large(t: Point, s: Point) -> float:
    return t.sigma**2 * fresh_share(t, s)


VARIANCES: dict[str, Callable[[Point, Point], float]] = {  # of p(z_s | z_t); Ho et al. 2020, section 3.2
    "small": _small,  # that of q(z_s | z_t, z_0): optimal if z_0 is one point
    "large": _large,  # that of q(z_t | z_s), beta for neighboring levels: optimal if z_0 is standard normal
}


def variational_bound(
    denoise: Denoise,
    z_0: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    variance: str = "large",
    decoder: str = "gaussian",
) -> Bound:
    """The terms of the bound, each estimated from one z_t drawn from q(z_t | z_0); one network call per time.

    The prior is normal with mean 0 and the deviation of `prior_std`. The decoder is normal around the estimate of z_0
    with variance sigma^2 of the last level (the large variance, since the small one is 0 there). `denoise` should not
    be
    guided: a guided chain is not a model of the data.

    Args:
        denoise: (z_t, t) -> z_0.
        z_0: data [B, ...]: unit-scale latents, or images in [-1, 1].
        times: [S + 1] falling to 0, as for samplers.
        schedule: gives alpha and sigma.
        generators: one per image, on the CPU.
        variance: a key of VARIANCES.
        decoder: a key of DECODERS: the density of continuous data, or the probability of 8-bit values.

    Raises:
        ValueError: times that do not fall to 0, an unknown variance or decoder, other numbers of generators and
            images, or data without 8-bit values for the decoder of 8-bit values.
    """
    _check(z_0, times, generators, variance, decoder)
    z_0 = z_0.to(torch.promote_types(z_0.dtype, torch.float32))
    steps, terms, errors = step_points(times, schedule), [], []
    for t, s in steps:
        estimate = denoise(t.alpha * z_0 + t.sigma * noise_like(z_0, generators), t.time).to(z_0.dtype)
        errors.append(_mean((z_0 - estimate).square()))
        if s.sigma:
            terms.append(_step(errors[-1], t, s, VARIANCES[variance](t, s)))
    return Bound(
        times=times[:-1].double().cpu(),
        prior=prior_bits(z_0, steps[0][0]),
        terms=torch.stack(terms) if terms else z_0.new_zeros(0, len(z_0)),
        decoder=-_mean(DECODERS[decoder](z_0, estimate, t.sigma)) / LOG_2,
        errors=torch.stack(errors),
    )


def rate_distortion(bound: Bound, unit: float = 1.0) -> RateDistortion:
    """Rate and distortion of the mean image at each time of a bound (Ho et al. 2020, algorithms 3 and 4).

    Args:
        bound: of any data.
        unit: distortion per 1.0 of the data; EIGHT_BIT_UNIT for images, as in the paper.
    """
    sent = torch.cat([bound.prior[None], bound.terms]).mean(1).cumsum(0)  # [S]
    distortion = unit * bound.errors.mean(1).sqrt()
    return RateDistortion(times=bound.times, rate=sent, distortion=distortion, remaining=bound.total.mean() - sent)


def prior_std(t: Point) -> float:
    """The standard deviation of the prior at a time: 1, or sigma if variance explodes (Song et al. 2021, app. C)."""
    return max(1.0, t.sigma)


def prior_bits(z_0: Tensor, t: Point) -> Tensor:
    """L_T [B] = KL(q(z_t | z_0) || N(0, prior_std^2)), in bits per dimension."""
    ratio = (t.sigma / prior_std(t)) ** 2
    return ((t.alpha / prior_std(t)) ** 2 * _mean(z_0.square()) + ratio - 1 - math.log(ratio)) / (2 * LOG_2)


def gaussian(z_0: Tensor, estimate: Tensor, sigma: float) -> Tensor:
    """The log density of z_0 [B, ...], each element normal around its estimate."""
    return -((z_0 - estimate) / sigma).square() / 2 - math.log(sigma) - math.log(2 * math.pi) / 2


def discretized(z_0: Tensor, estimate: Tensor, sigma: float) -> Tensor:
    """The log probability of 8-bit values z_0 [B, ...] in [-1, 1], normal around the estimate (Ho et al. 2020, eq. 13).

    The bin of a value has width 2/255; those of the lowest and highest value are unbounded.
    """
    low, high = (z_0 - HALF_BIN - estimate) / sigma, (z_0 + HALF_BIN - estimate) / sigma
    low = torch.where(z_0 < HALF_BIN - 1, -torch.inf, low)
    high = torch.where(z_0 > 1 - HALF_BIN, torch.inf, high)
    above = low + high > 0  # mirrored, since logarithms are precise only below the mean
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    larger = torch.special.log_ndtr(high)
    return larger + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - larger))


DECODERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # (z_0, estimate, sigma) -> log p per element
    "gaussian": gaussian,
    "discretized": discretized,
}


def _step(error: Tensor, t: Point, s: Point, variance: float) -> Tensor:
    """KL(q(z_s | z_t, z_0) || p(z_s | z_t)) [B] of a mean squared error, in bits per dimension (Ho et al. 2020, eq. 8).

    For the small variance it is the error times half of the increase of the signal-to-noise ratio (Kingma et al. 2021).
    """
    ratio = _small(t, s) / variance
    return ((s.alpha * fresh_share(t, s)) ** 2 / variance * error + ratio - 1 - math.log(ratio)) / (2 * LOG_2)


def _check(z_0: Tensor, times: Tensor, generators: Generators, variance: str, decoder: str) -> None:
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; use one of {', '.join(VARIANCES)}")
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; use one of {', '.join(DECODERS)}")
    if times[-1] != 0:
        raise ValueError(f"times end at {times[-1].item():g}, but the decoder's step ends at 0; append 0")
    if len(z_0) != len(generators):
        raise ValueError(f"{len(z_0)} images need as many generators, not {len(generators)}")
    if decoder == "discretized":
        check_eight_bit(z_0)


def check_eight_bit(images: Tensor) -> None:
    """Raise ValueError unless all elements of images [B, ...] are 8-bit values, k / 127.5 - 1 for k in 0 .. 255."""
    k = (images.double() + 1) * EIGHT_BIT_UNIT
    off = (k - k.round().clamp(0, 255)).abs().max().item()
    if not off < 0.01:
        raise ValueError(f"images are up to {off:.3g} of 255 off values of 8 bits in [-1, 1]; round or rescale them")


def _mean(elements: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return elements.flatten(1).mean(1)
